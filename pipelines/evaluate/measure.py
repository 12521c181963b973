"""Measuring a model: the rows that are wanted and not known are made in tasks, and figures are taken from all of them.

A task's result lies in the store until the node's unit is published: a run that is killed does that task again at most.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.dataset.figures import Figure
from pipelines.dataset.images import SelectedImages
from pipelines.evaluate.figures import KERNEL_SUBSETS, Measured, figures, subset_size
from pipelines.evaluate.known import Known, Values, packed
from pipelines.evaluate.pairs import Comparison, Pair
from pipelines.evaluate.parts import SHOWN, Part, identifiers, parts_of
from pipelines.evaluate.worker import Kind, MeasureJob, Task
from pipelines.recipe import EvaluateSpec
from pipelines.reporting import Report

if TYPE_CHECKING:
    from pipelines.actors import Pool


@dataclass(frozen=True)
class Result:
    """`facts`: what all figures are to be read with."""

    figures: Sequence[Figure]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class _Planned:
    task: Task
    part: Part
    kinds: Sequence[Kind]
    places: Sequence[int]


def make_rows(parts: Sequence[Part], keys: Mapping[str, str], known: Known, pool: Pool, report: Report) -> None:
    """Have all rows of the parts known. `pool` is of `worker.Measurer`."""
    planned = list(_planned(parts, keys, known))
    total = sum(len(part.rows) for part in parts if part.is_seen)
    done = before = total - sum(len(one.places) for one in planned if one.part.is_seen)
    started_s = time.monotonic()
    report.progress(done, total, "images")
    for number, arrays in pool.map("measure", [one.task for one in planned]):
        one = planned[number]
        known.add({keys[one.part.column(kind)]: arrays[kind] for kind in one.kinds}, one.part.rows[list(one.places)])
        done += len(one.places) if one.part.is_seen else 0
        images_per_s = (done - before) / (time.monotonic() - started_s)
        report.progress(done, total, "images", f"{images_per_s:.0f} images/s")
    if done > before:
        report.metrics({"images_per_s": (done - before) / (time.monotonic() - started_s)})


def count_known(parts: Sequence[Part], keys: Mapping[str, str], known: Known) -> tuple[int, int]:
    """How many rows of pictures and images are known, and how many are known but for the judge's view of them."""
    whole = lacking_judgement = 0
    for part in parts:
        if part.is_seen:
            missing = [_missing(part, place, keys, known) for place in range(len(part.rows))]
            whole += sum(not kinds for kinds in missing)
            lacking_judgement += sum(kinds == ("judged",) for kinds in missing)
    return whole, lacking_judgement


def _planned(parts: Sequence[Part], keys: Mapping[str, str], known: Known) -> Iterator[_Planned]:
    """Tasks for what is missing; rows that lack the same go together."""
    number = 0
    for part in parts:
        lacking: dict[tuple[Kind, ...], list[int]] = {}
        for place in range(len(part.rows)):
            lacking.setdefault(_missing(part, place, keys, known), []).append(place)
        lacking.pop((), None)
        for kinds, places in lacking.items():
            for first in range(0, len(places), part.batch_size):
                some = places[first : first + part.batch_size]
                yield _Planned(part.make(number, kinds, some), part, kinds, some)
                number += 1


def _missing(part: Part, place: int, keys: Mapping[str, str], known: Known) -> tuple[Kind, ...]:
    row = part.rows[place]
    return tuple(kind for kind in part.wanted(place) if not known.has(keys[part.column(kind)], row))


class Measurement:
    """A model's figures against `comparison`, once all rows of `parts` are known."""

    def __init__(self, job: MeasureJob, comparison: Comparison, spec: EvaluateSpec, scores: Artifact | None) -> None:
        self._job = job
        self._store: Store = job.store
        self._comparison = comparison
        self._spec = spec
        self._size_px = size_px_of(job)
        self._scores = scores if scores is not None and _are_stored_in(comparison.pairs, self._size_px) else None
        self.parts = parts_of(comparison, spec, features_known=self._scores is not None)

    @property
    def num_pictures(self) -> int:
        return sum(len(part.rows) for part in self.parts.values() if part.subject in {"trained", "initial"})

    def result(self, keys: Mapping[str, str], known: Known, identities: Mapping[str, str]) -> Result:
        """`identities` as `worker.Measurer` has them."""

        def told(name: str, prefix: str = "") -> dict[str, Values]:
            part = self.parts.get(name)
            kinds = () if part is None else part.kinds
            return {f"{prefix}{kind}": known.values(keys[part.column(kind)], part.rows) for kind in kinds if part}

        comparison = self._comparison
        measured = Measured(
            described=told("described") | self._scored(comparison.described),
            reference=told("reference") | self._scored(comparison.reference),
            held_out=told("held_out") | self._scored(comparison.held_out),
            seen=told("seen", "trained_") | told("untrained", "initial_") | told("prompts_seen"),
            unseen=told("unseen", "trained_") | told("prompts_unseen"),
        )
        who = {name: value for name, value in identities.items() if name != "text_encoder"}
        found = figures(measured, comparison.seen, self._spec, who["extractor"])
        return Result(found, who | self._facts())

    def features_file(self, keys: Mapping[str, str], known: Known) -> bytes:
        """`features.npz`: the columns of all parts, and whose rows they are."""
        rows: dict[str, list[Values]] = {}
        for part in self.parts.values():
            for kind in part.kinds:
                rows.setdefault(part.column(kind), []).append(part.rows)
            if part.num_pictures:
                rows.setdefault(part.column("pictures"), []).append(part.rows[: part.num_pictures])
        every = {name: np.concatenate(several) for name, several in rows.items()}
        columns = {name: (own, known.values(keys[name], own)) for name, own in every.items()}
        beside = {name: np.array(values) for name, values in identifiers(self._comparison, self._spec).items()}
        return packed(columns, beside)

    @property
    def shown_pairs(self) -> list[Sequence[Pair]]:
        """The pairs of each side whose pictures are shown, from left to right; a side without any is left out."""
        sides = (self._comparison.described, self._comparison.held_out)
        return [side[:SHOWN] for side in sides if side]

    def shown_images(self, keys: Mapping[str, str], known: Known) -> list[tuple[Tensor, Tensor]]:
        """The real images and the pictures of each side in `shown_pairs`, uint8 [n, H, W, 3]."""
        figures = self._job.figures
        assert figures is not None, "there is a comparison"
        sides = []
        for pairs, name in zip(self.shown_pairs, ("seen", "unseen"), strict=False):
            images = SelectedImages(
                self._store, figures.acquire, figures.select, split=pairs[0].split, size_px=self._size_px, cache_bytes=0
            )
            part = self.parts[name]
            pictures = known.values(keys[part.column("pictures")], part.rows[:SHOWN])
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

    def _scored(self, pairs: Sequence[Pair]) -> dict[str, Values]:
        """Features that scoring has kept, where these are used."""
        if self._scores is None or not pairs:
            return {}
        from pipelines.dataset.scores import load_features

        return {"features": load_features(self._scores, self._store, [(pair.shard, pair.key) for pair in pairs])}


def size_px_of(job: MeasureJob) -> int:
    """Side in pixels of the pictures that the model makes."""
    return int(job.store.read_json(job.autoencoder.path("vae/config.json"))["sample_size"])


def _are_stored_in(pairs: Sequence[Pair], size_px: int) -> bool:
    """Whether all images lie in their shards as the model's pictures are: squares of `size_px`. Features of others,
    which scoring has seen as they lie there, would tell sizes apart rather than pictures."""
    return all(pair.stored_px == (size_px, size_px) for pair in pairs)
