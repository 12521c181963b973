"""One side of a case on one device: built, warmed up, timed, and gone again before the next is built."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from cases.peaks import device_name, peak_tflops
from cases.rows import Row
from torch import Tensor

Call = Callable[[], Tensor]
WARM_UP = 3
TOLERANCE = 0.2
"""Root mean square of the difference of first results, relative to that of the first side's: they are in bf16 and may
have gone through 20 steps. What differs more is no comparison."""


@dataclass(frozen=True)
class Place:
    """What is measured."""

    case: str
    who: str
    how: str
    """ "eager" or "compiled"."""
    size_px: int
    batch: int
    tflop_per_image: float

    @property
    def words(self) -> str:
        return f"{self.case}, {self.size_px} px, batch {self.batch}, {self.how}"


@dataclass(frozen=True)
class Figure:
    """One measurement."""

    place: Place
    step_s: float
    rounds: int
    mfu: float | None
    """Share of the device's peak rate, of the operations that the model needs; None where the rate is not known."""
    peak_memory_gib: float | None
    """Of this side alone: weights, optimizer and activations."""
    difference: float
    """Of the first result, from that of the side that came first."""

    @property
    def images_per_s(self) -> float:
        return self.place.batch / self.step_s

    def to_json(self) -> dict[str, Any]:
        return asdict(self.place) | asdict(self) | {"images_per_s": self.images_per_s, "place": self.place.words}

    def line(self) -> str:
        mfu = "" if self.mfu is None else f"  MFU {100 * self.mfu:.1f} %"
        memory = "" if self.peak_memory_gib is None else f"  {self.peak_memory_gib:.1f} GiB"
        place = self.place
        return (
            f"{place.case:<8} {place.who:<10} {place.how:<9} {place.size_px} px, batch {place.batch:<3}"
            f" {self.images_per_s:9.1f} images/s  {1e3 * self.step_s:9.1f} ms"
            f"  {place.tflop_per_image:.3g} TFLOP/image{mfu}{memory}"
            f"  difference {self.difference:.0e}"
        )


class Meter:
    """Figures as they come: each is told at once, and what one side fails at is told too."""

    def __init__(self, device: str, rounds: int, tell: Callable[[Meter, str], None]) -> None:
        self.device, self.rounds = device, rounds
        self.figures: list[Figure] = []
        self.failed: list[str] = []
        self._tell = tell
        self._firsts: dict[tuple[str, int, int], Tensor] = {}
        self._on_gpu = device.startswith("cuda")

    def measure(self, place: Place, make: Callable[[], Call]) -> None:
        """Build with `make`, on a device that holds nothing else, and time what it gives.

        A side that the device can't run has no figure, and one whose first result is not that of the first side's no
        row.
        """
        self._clean()
        try:
            figure = self._timed(place, make)
        except RuntimeError as error:  # out of memory and compilers' errors among them
            first = (str(error).splitlines() or [""])[0]
            self._fail(place, f"{type(error).__name__}: {first}")
        else:
            self.figures.append(figure)
            self._tell(self, figure.line())
            if not figure.difference <= TOLERANCE:
                self._fail(place, f"the first result differs by {figure.difference:.1e} from that of the first side")
        self._clean()

    def rows(self, pairs: dict[str, str]) -> list[Row]:
        """Comparisons in images a second; `pairs` has who is compared, and with whom."""
        same = [figure for figure in self.figures if figure.difference <= TOLERANCE]
        found = {(figure.place.words, figure.place.who): figure for figure in same}
        return [
            Row(f"{words}: {who} beside {pairs[who]}", "images/s", figure.images_per_s, other.images_per_s)
            for (words, who), figure in found.items()
            if who in pairs and (other := found.get((words, pairs[who])))
        ]

    def _timed(self, place: Place, make: Callable[[], Call]) -> Figure:
        call = make()
        difference = self._difference(place, call())
        for _ in range(WARM_UP if self._on_gpu else 0):
            call()
        times = []
        for _ in range(self.rounds):
            self._wait()
            started_s = time.perf_counter()
            call()
            self._wait()
            times.append(time.perf_counter() - started_s)
        step_s = statistics.median(times)
        if close := getattr(call, "close", None):
            close()
        rate = peak_tflops(device_name(self.device))
        mfu = None if rate is None else place.tflop_per_image * place.batch / step_s / rate
        memory = torch.cuda.max_memory_allocated() / 2**30 if self._on_gpu else None
        return Figure(place, step_s, self.rounds, mfu, memory, difference)

    def _difference(self, place: Place, result: Tensor) -> float:
        key = (place.case, place.size_px, place.batch)
        own = result.detach().double().cpu()
        first = self._firsts.setdefault(key, own)
        return float((own - first).square().mean().sqrt() / first.square().mean().sqrt())

    def _fail(self, place: Place, why: str) -> None:
        self.failed.append(f"{place.words}, {place.who}: {why}")
        self._tell(self, f"FAILED   {self.failed[-1]}")

    def _clean(self) -> None:
        if "torch._dynamo" in sys.modules:  # whose import takes seconds, and which knows what was compiled
            torch.compiler.reset()
        gc.collect()
        if self._on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize()
