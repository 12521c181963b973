"""Two ways to the same result, timed in turn: what every case of `benchmarks/model.py` is made of."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Result:
    """One case: both medians, and how far apart the two results were."""

    case: str
    """Of the table in docs/benchmarks.md: "unet step", "vae encode", "sample", "frechet"."""
    setting: str
    """Shapes, dtype and batch, in words."""
    device: str
    peer: str
    ours_s: float
    peer_s: float
    rounds: int
    difference: float
    """Largest difference of the results, relative to the peer's largest value."""
    tolerance: float
    aim: float | None
    """The ratio asked for."""

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        return self.peer_s / self.ours_s

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}


def compare(
    case: str,
    setting: str,
    *,
    device: str,
    peer: str,
    ours: Callable[[], torch.Tensor | float],
    theirs: Callable[[], torch.Tensor | float],
    rounds: int,
    tolerance: float,
    aim: float | None,
    reset: Callable[[], None] | None = None,
) -> Result:
    """Time `ours` and `theirs` in alternating rounds, after one of each that isn't counted and whose results are
    compared. `reset` runs before each call, untimed.

    Raises `AssertionError` if the results differ by more than `tolerance`.
    """
    difference = relative_difference(_run(ours, device, reset)[1], _run(theirs, device, reset)[1])
    assert difference <= tolerance, f"{case} ({setting}): results differ by {difference:.2e}, more than {tolerance:.0e}"
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(rounds):
        order = (("ours", ours), ("theirs", theirs))
        for name, function in order if number % 2 == 0 else order[::-1]:
            times[name].append(_run(function, device, reset)[0])
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Result(case, setting, device, peer, medians["ours"], medians["theirs"], rounds, difference, tolerance, aim)


def relative_difference(ours: torch.Tensor | float, theirs: torch.Tensor | float) -> float:
    """Largest difference, relative to the largest value of `theirs`."""
    one, other = (torch.as_tensor(value, dtype=torch.float64).detach().cpu() for value in (ours, theirs))
    assert one.shape == other.shape, f"results are {tuple(one.shape)} and {tuple(other.shape)}"
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def _run(
    function: Callable[[], torch.Tensor | float], device: str, reset: Callable[[], None] | None
) -> tuple[float, torch.Tensor | float]:
    if reset is not None:
        reset()
    _wait(device)
    started_s = time.perf_counter()
    result = function()
    _wait(device)
    return time.perf_counter() - started_s, result


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
