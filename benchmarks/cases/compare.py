"""Two ways to the same result, each in its fastest setting, timed in turn: what every case of `benchmarks/model.py` is
made of."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from cases.rows import Row

Value = torch.Tensor | float
Call = Callable[[], Value]
Make = Callable[[], Call]
"""Builds what is called, from the same initial weights each time."""

COMPILED = ", compiled"
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-1, "float16": 1e-1}
"""Of results in one precision: in half of it, two orders of the same operations differ by rounding."""


@dataclass(frozen=True)
class Side:
    """One of two ways to a result."""

    name: str
    settings: Mapping[str, Make]
    """By what is set: a precision first, then what else: "bfloat16, channels_last"."""
    compiled: Callable[[str], Make] | None = None
    """One of the settings under `torch.compile`; None: not tried."""


@dataclass(frozen=True)
class Result:
    """One case: both medians, in which settings, and how far apart the two results were."""

    case: str
    """Of the table in docs/benchmarks.md: "unet step", "vae encode", "sample", "frechet"."""
    shape: str
    """Shapes and batch, in words."""
    device: str
    peer: str
    ours_s: float
    peer_s: float
    ours_setting: str
    peer_setting: str
    rounds: int
    difference: float
    """Largest difference of the results in the first precision, relative to the peer's largest value."""
    aim: float | None
    """The ratio asked for."""
    tried: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Seconds of each setting when it was chosen, by side."""

    @property
    def row(self) -> Row:
        return Row(f"{self.case}: {self.shape}", "ms", 1e3 * self.ours_s, 1e3 * self.peer_s)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.row.ratio}


@dataclass
class _Chosen:
    setting: str
    call: Call
    results: dict[str, torch.Tensor]
    """Of the first call in each setting."""
    tried: dict[str, float]


def compare(
    case: str,
    shape: str,
    ours: Side,
    theirs: Side,
    *,
    device: str,
    rounds: int,
    aim: float | None,
    tolerances: Mapping[str, float] = TOLERANCES,
) -> Result:
    """Find each side's fastest setting, and time the two in alternating rounds.

    Raises `AssertionError` if results in one precision differ by more than its tolerance.
    """
    chosen = [_fastest(side, device, tries=3 if rounds > 5 else 1) for side in (ours, theirs)]
    difference = _checked(f"{case} ({shape})", chosen[0].results, chosen[1].results, tolerances)
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            times[which].append(_run(chosen[which].call, device)[0])
    return Result(
        case=case,
        shape=shape,
        device=device,
        peer=theirs.name,
        ours_s=statistics.median(times[0]),
        peer_s=statistics.median(times[1]),
        ours_setting=chosen[0].setting,
        peer_setting=chosen[1].setting,
        rounds=rounds,
        difference=difference,
        aim=aim,
        tried={"ours": chosen[0].tried, "peer": chosen[1].tried},
    )


def relative_difference(ours: Value, theirs: Value) -> float:
    """Largest difference, relative to the largest value of `theirs`."""
    one, other = (torch.as_tensor(value, dtype=torch.float64).detach().cpu() for value in (ours, theirs))
    assert one.shape == other.shape, f"results are {tuple(one.shape)} and {tuple(other.shape)}"
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def _fastest(side: Side, device: str, tries: int) -> _Chosen:
    """Each setting is built, called once, timed, and let go of unless it is the fastest so far."""
    best: _Chosen | None = None
    for setting, make in side.settings.items():
        best = _faster(best, setting, make, device, tries)
    assert best is not None, f"{side.name} has no settings"
    if side.compiled is not None:
        best = _faster(best, best.setting + COMPILED, side.compiled(best.setting), device, tries)
    return best


def _faster(best: _Chosen | None, setting: str, make: Make, device: str, tries: int) -> _Chosen:
    call = make()
    result = torch.as_tensor(_run(call, device)[1], dtype=torch.float64).detach().cpu()
    taken_s = min(_run(call, device)[0] for _ in range(tries))
    if best is None:
        return _Chosen(setting, call, {setting: result}, {setting: taken_s})
    best.results[setting] = result
    if taken_s < best.tried[best.setting]:
        best.setting, best.call = setting, call
    best.tried[setting] = taken_s
    del call
    gc.collect()
    return best


def _checked(
    what: str,
    ours: Mapping[str, torch.Tensor],
    theirs: Mapping[str, torch.Tensor],
    tolerances: Mapping[str, float],
) -> float:
    """The largest difference in the first precision."""
    differences: dict[str, float] = {}
    for setting, own in ours.items():
        precision = setting.partition(",")[0]
        for other_setting, other in theirs.items():
            if other_setting.partition(",")[0] == precision:
                difference = relative_difference(own, other)
                assert difference <= tolerances[precision], (
                    f"{what}: results of {setting} and the peer's {other_setting} differ by {difference:.2e},"
                    f" more than {tolerances[precision]:.0e}"
                )
                differences[precision] = max(difference, differences.get(precision, 0))
    assert differences, f"{what}: no precision is both sides', nothing says that they compute the same"
    return next(iter(differences.values()))


def _run(function: Call, device: str) -> tuple[float, Value]:
    _wait(device)
    started_s = time.perf_counter()
    result = function()
    _wait(device)
    return time.perf_counter() - started_s, result


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
