"""The model library beside its peers: diffusers (U-Net, VAE, sampling) and torch-fidelity (Frechet distance).

Each case runs both sides in one process, on the same weights and inputs, compares what comes out, and lets them take
turns; the ratio is of medians. Threads are torch's own (OMP_NUM_THREADS).

    python benchmarks/model.py [--quick] [--device cpu|cuda] [--case NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from cases import frechet, sample, unet, vae
from cases.compare import Result

CASES: dict[str, Callable[[bool, str], list[Result]]] = {
    "unet": unet.run,
    "vae": vae.run,
    "sample": sample.run,
    "frechet": frechet.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller shapes: within 60 s on 2 cores")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only these")
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    results: list[Result] = []
    for name in options.case or CASES:
        for result in CASES[name](options.quick, options.device):
            print(line(result), flush=True)
            results.append(result)
    if options.json is not None:
        options.json.write_text(json.dumps(report(results), indent=2) + "\n", encoding="utf-8")


def line(result: Result) -> str:
    aim = "" if result.aim is None else f" (aim {result.aim:.2f})"
    return (
        f"{result.case:<12} {result.setting:<58} {result.ours_s * 1e3:9.1f} ms"
        f"  {result.peer} {result.peer_s * 1e3:9.1f} ms  {result.ratio:.2f} times{aim}"
        f"  difference {result.difference:.1e}"
    )


def report(results: list[Result]) -> dict[str, Any]:
    """What a reader needs to place the figures."""
    versions = {name: metadata.version(name) for name in ("torch", "diffusers", "torch-fidelity", "numpy")}
    return {
        "date": datetime.date.today().isoformat(),
        "machine": {"processor": processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions | {"python": platform.python_version()},
        "results": [result.to_json() for result in results],
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (each.partition(":")[2].strip() for each in lines if each.startswith("model name")), platform.processor()
    )


if __name__ == "__main__":
    main()
