"""What every benchmark ends with: one line of JSON, for programs; and the machine, for people."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Row:
    """One comparison. Lower is better in "ms", higher in "images/s"."""

    case: str
    unit: Literal["ms", "images/s"]
    ours: float
    peer: float

    @property
    def ratio(self) -> float:
        """Above 1 where ours is better, whatever the unit."""
        return self.peer / self.ours if self.unit == "ms" else self.ours / self.peer

    def to_json(self) -> dict[str, Any]:
        return {key: _rounded(value) for key, value in (asdict(self) | {"ratio": self.ratio}).items()}


def last_line(benchmark: str, rows: Sequence[Row]) -> str:
    """What is printed last, on one line."""
    return json.dumps({"benchmark": benchmark, "rows": [row.to_json() for row in rows]})


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Whole or not at all, where a path is given."""
    if path is not None:
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


def processor() -> str:
    """The processor's name where Linux tells it, the architecture elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.machine()}"


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
