"""Running figures of training: losses averaged over steps and ranks, and how fast it goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch

from pipelines.train.ranks import Ranks
from pipelines.train.step import StepResult


class Meter:
    """Collects steps until their means are asked for; every rank asks at the same step."""

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks = ranks
        self._device = device
        self._results: list[StepResult] = []
        self._duration_s = 0.0

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        started_s = time.perf_counter()
        yield
        self._duration_s += time.perf_counter() - started_s

    def add(self, result: StepResult) -> None:
        self._results.append(result)

    def means(self, global_batch_size: int) -> dict[str, float]:
        """Since the last call: losses over all ranks, skipped updates, the others' gradient norm, images per second."""
        names = list(self._results[0].losses)
        losses = torch.stack([torch.stack([one.losses[name] for name in names]) for one in self._results])
        means = self._ranks.mean(losses.mean(dim=0).double()).tolist()
        norms = [one.grad_norm for one in self._results if one.applied]
        figures = {
            **dict(zip(names, means, strict=True)),
            "skipped_updates": float(len(self._results) - len(norms)),
            "images_per_s": global_batch_size * len(self._results) / self._duration_s,
        }
        if norms:
            figures["grad_norm"] = sum(norms) / len(norms)
        self._results, self._duration_s = [], 0.0
        return figures
