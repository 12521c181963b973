"""Measuring a model: what is to be made and looked at, in tasks; their results, kept until all are there; the figures.

A task's result lies in the store until the node's unit is published: a run that is killed does that task again at most.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pipelines.artifacts import Artifact
from pipelines.dataset.images import SelectedImages
from pipelines.evaluate.figures import KERNEL_SUBSETS, Measured, figures, subset_size
from pipelines.evaluate.generate import Shot
from pipelines.evaluate.pairs import Comparison, Pair
from pipelines.evaluate.worker import Arrays, ImagesTask, MeasureJob, PicturesTask
from pipelines.recipe import EvaluateSpec
from pipelines.reporting import Report

if TYPE_CHECKING:
    from pipelines.actors import Pool

SHOWN = 8
"""Prompts of each side whose pictures are shown beside the real images."""

Task = PicturesTask | ImagesTask


@dataclass(frozen=True)
class Result:
    """`figures` by name; `facts`: all else that they are to be read with. `shown`: uint8 [n, H, W, 3] of each side."""

    figures: Mapping[str, float]
    facts: Mapping[str, Any]
    shown: Mapping[str, np.ndarray[Any, np.dtype[np.uint8]]]
    num_pictures: int


class Measurement:
    """One model to measure against `comparison`. `work` is a folder of the store for what is not published."""

    def __init__(
        self, job: MeasureJob, work: str, comparison: Comparison, spec: EvaluateSpec, scores: Artifact | None
    ) -> None:
        self.job = job
        self._store = job.store
        self._work = f"{work}/{spec.batch_size}"
        self._comparison = comparison
        self._spec = spec
        self._size_px = int(job.store.read_json(job.autoencoder.path("vae/config.json"))["sample_size"])
        self._scores = scores if scores is not None and _are_stored_in(comparison.pairs, self._size_px) else None
        self._tasks = list(self._all_tasks())

    @property
    def num_images(self) -> int:
        """Pictures to make and real images to look at."""
        return sum(task.num_images for task in self._tasks)

    def run(self, pool: Pool, report: Report, *, done: int, total: int) -> Result:
        """Make, look and measure. `pool` is of `worker.Measurer`; `done` of `total` images are done elsewhere."""
        arrays = self._results(pool, report, done, total)
        measured = Measured(
            described=self._of_images("described", self._comparison.described, arrays),
            reference=self._of_images("reference", self._comparison.reference, arrays),
            held_out=self._of_images("held_out", self._comparison.held_out, arrays),
            seen=_joined("seen", arrays),
            unseen=_joined("unseen", arrays),
        )
        who = pool.call("identities")
        report.progress(total, total, "images", "measuring")
        pictures = sum(task.num_images for task in self._tasks if isinstance(task, PicturesTask))
        return Result(
            figures(measured, self._comparison.seen, self._spec, who["extractor"]),
            who | self._facts(),
            {side: _shown(side, arrays) for side in ("seen", "unseen")},
            pictures,
        )

    @property
    def shown_pairs(self) -> list[Sequence[Pair]]:
        """Of each side those whose pictures are shown, from left to right; a side without any is left out."""
        sides = (self._comparison.described, self._comparison.held_out)
        return [side[:SHOWN] for side in sides if side]

    def shown_images(self, result: Result) -> list[tuple[Tensor, Tensor]]:
        """Of each side in `shown_pairs` the real images and the pictures, uint8 [n, H, W, 3]."""
        job = self.job
        sides = []
        for pairs, pictures in zip(self.shown_pairs, result.shown.values(), strict=False):
            images = SelectedImages(
                job.store, job.acquire, job.select, split=pairs[0].split, size_px=self._size_px, cache_bytes=0
            )
            sides.append((images.rows([pair.row for pair in pairs]), torch.from_numpy(pictures)))
        return sides

    def _facts(self) -> dict[str, Any]:
        num_images = len(self._comparison.described)
        return {
            "images": num_images,
            "prompts_seen": len(self._comparison.seen),
            "prompts_held_out": len(self._comparison.held_out),
            "derangements": self._spec.derangements,
            "kernel_subsets": KERNEL_SUBSETS,
            "kernel_subset_size": subset_size(num_images),
            "seed": self._spec.seed,
        }

    def _all_tasks(self) -> Iterator[Task]:
        spec, comparison = self._spec, self._comparison
        networks = ("trained", "initial") if spec.untrained else ("trained",)
        # Those whose pictures are shown first, which puts them into the first tasks.
        yield from self._pictures("seen", _shots(comparison.described, spec.seed), networks)
        yield from self._pictures("unseen", _shots(comparison.held_out, spec.seed), ("trained",))
        judged = spec.judge is not None
        known = self._scores is not None
        for name, pairs in (
            ("described", comparison.described),
            ("reference", comparison.reference),
            ("held_out", comparison.held_out),
        ):
            needs_judge = judged and name == "described"
            if not known or needs_judge:
                for number, part in _batches(pairs, spec.batch_size):
                    rows = [pair.row for pair in part]
                    yield ImagesTask(f"{name}/{number:05d}", part[0].split, rows, not known, needs_judge)

    def _pictures(self, name: str, shots: Sequence[Shot], networks: Sequence[str]) -> Iterator[PicturesTask]:
        for number, part in _batches(shots, self._spec.batch_size):
            shown = max(0, min(len(part), SHOWN - number * self._spec.batch_size))
            yield PicturesTask(f"{name}/{number:05d}", part, networks, shown)

    def _results(self, pool: Pool, report: Report, done: int, total: int) -> dict[str, Arrays]:
        """By task, in the tasks' order; those that an earlier run left behind are taken as they are."""
        results = {
            task.name: _unpacked(self._store.read_bytes(self._path(task.name)))
            for task in self._tasks
            if self._store.exists(self._path(task.name))
        }
        sizes = {task.name: task.num_images for task in self._tasks}
        before = done + sum(sizes[name] for name in results)
        now, started_s = 0, time.monotonic()
        report.progress(before, total, "images")
        for name, arrays in pool.map("measure", [task for task in self._tasks if task.name not in results]):
            self._store.publish_bytes(self._path(name), _packed(arrays))
            results[name] = arrays
            now += sizes[name]
            report.progress(before + now, total, "images", f"{now / (time.monotonic() - started_s):.0f} images/s")
        if now:
            report.metrics({"images_per_s": now / (time.monotonic() - started_s)})
        return {name: results[name] for name in sizes}

    def _path(self, name: str) -> str:
        return f"{self._work}/{name}.npz"

    def _of_images(self, name: str, pairs: Sequence[Pair], results: Mapping[str, Arrays]) -> Arrays:
        found = dict(_joined(name, results))
        if self._scores is not None and pairs:
            from pipelines.dataset.scores import load_features

            found["features"] = load_features(self._scores, self._store, [(pair.shard, pair.key) for pair in pairs])
        return found


def _are_stored_in(pairs: Sequence[Pair], size_px: int) -> bool:
    """Whether all images lie in their shards as the model's pictures are: squares of `size_px`. Features of others,
    which scoring has seen as they lie there, would tell sizes apart rather than pictures."""
    return all(pair.stored_px == (size_px, size_px) for pair in pairs)


def _shots(pairs: Sequence[Pair], seed: int) -> list[Shot]:
    """A picture for each caption, whose noise depends on the pair alone."""
    return [Shot(pair.caption, _noise_seed(seed, pair.uid)) for pair in pairs]


def _noise_seed(seed: int, uid: str) -> int:
    return int.from_bytes(hashlib.sha256(f"noise\0{seed}\0{uid}".encode()).digest()[:6])


def _batches(items: Sequence[Any], size: int) -> Iterator[tuple[int, Sequence[Any]]]:
    for number, first in enumerate(range(0, len(items), size)):
        yield number, items[first : first + size]


def _joined(name: str, results: Mapping[str, Arrays]) -> Arrays:
    """The arrays of all tasks `name/...`, one after another, without `shown`."""
    parts = [arrays for task, arrays in results.items() if task.startswith(f"{name}/")]
    if not parts:
        return {}
    return {key: np.concatenate([arrays[key] for arrays in parts]) for key in parts[0] if key != "shown"}


def _shown(name: str, results: Mapping[str, Arrays]) -> Any:
    parts = [arrays["shown"] for task, arrays in results.items() if task.startswith(f"{name}/") and "shown" in arrays]
    return np.concatenate(parts) if parts else np.zeros((0,), np.uint8)


def _packed(arrays: Arrays) -> bytes:
    sink = io.BytesIO()
    np.savez(sink, **arrays)  # type: ignore[arg-type]
    return sink.getvalue()


def _unpacked(data: bytes) -> Arrays:
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
