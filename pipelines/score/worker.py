"""A process that scores shards: decodes each image once for all scorers that lack it, publishes a unit a scorer.

Runs as a Ray actor; knows nothing of Ray.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infra.storage import Store
from ldm.clip import Clip, load_clip
from pipelines.actors import batched
from pipelines.artifacts import Counts, Unit, fetch_folder
from pipelines.dataset.earlier import Inputs
from pipelines.dataset.ledgers import kept_ledger, shard_of
from pipelines.dataset.scores import Identity
from pipelines.dataset.shards import images_of
from pipelines.publishing import publish_unit
from pipelines.recipe import ScoreSpec
from pipelines.recipe.plugins import Plugin, load_plugins
from pipelines.recipe.scorers import Place
from pipelines.score.scorer import Scorer
from pipelines.score.scorers import Making, make_scorers
from pipelines.score.values import Pairs, Part, PartValues

LEDGER_COLUMNS = ("uid", "key", "caption", "stored_sha256")


@dataclass(frozen=True)
class ScoreJob:
    """What every shard is scored with, and where its units go. `clip` is of a CLIP that the recipe trains, `keys` what
    registered scorers are in keys, `features_sha256` the hash of an extractor's weights that are given by path."""

    store: Store
    node: str
    spec: ScoreSpec
    clip: Unit | None
    keys: Mapping[str, Any] = field(default_factory=dict)
    features_sha256: str | None = None
    plugins: tuple[Plugin, ...] = ()


@dataclass(frozen=True)
class ScoreTask:
    """Units to be made in one go: parts of a shard of `acquire`."""

    source: Unit
    parts: Sequence[Part]

    @property
    def unit_keys(self) -> list[str]:
        return [part.unit_key for part in self.parts]

    @property
    def num_images(self) -> int:
        """Number of images that a part lacks values of."""
        complete = np.ones(self.source.counts.kept, bool)
        for part in self.parts:
            copied = np.zeros(len(complete), bool)
            for earlier in part.copied:
                copied[earlier.here] = True
            complete &= copied
        return int((~complete).sum())


class ShardScorer:
    """Scores one shard after another. What a scorer needs is loaded by the first call for which it is needed."""

    def __init__(self, job: ScoreJob, device: str, threads: int) -> None:
        self._job = job
        self._device = device
        self._threads = min(threads, len(os.sched_getaffinity(0)))
        torch.set_num_threads(self._threads)

    def identities(self) -> dict[str, Identity]:
        """What the pairs are scored with, by the recipe's name for it."""
        return {name: scorer.identity for name, scorer in self._scorers.items()}

    def inputs(self, numbered: tuple[int, ScoreTask]) -> tuple[int, list[Inputs]]:
        """What each of the task's parts is made from, with the task's number."""
        number, task = numbered
        pairs = self._pairs(task.source)
        return number, [pairs.inputs(self._scorers[part.scorer]) for part in task.parts]

    def score(self, task: ScoreTask) -> list[Unit]:
        """Score and publish the parts of one shard.

        Raises `pipelines.dataset.errors.UnusableImage` if an image is missing or can't be decoded, `ScoreError` if what
        is said of it is NaN or infinite.
        """
        job, pairs = self._job, self._pairs(task.source)
        parts = [PartValues(part, self._scorers[part.scorer], pairs) for part in task.parts]
        for part in parts:
            part.copy(job.store)
        rows = sorted(set().union(*(part.missing for part in parts)))
        images = images_of(task.source, [pairs.key[row] for row in rows], job.store)
        for batch in batched(zip(rows, images, strict=True), job.spec.batch_size):
            for part in parts:
                part.compute(batch)
        counts = Counts(len(pairs.key), len(pairs.key))
        return [
            publish_unit(job.store, job.node, part.part.unit_key, part.files(), counts, part.facts().info())
            for part in parts
        ]

    def _pairs(self, source: Unit) -> Pairs:
        kept = kept_ledger(source, self._job.store, LEDGER_COLUMNS)
        columns = {name: kept.column(name).to_pylist() for name in kept.column_names}
        captions = [caption or "" for caption in columns["caption"]]
        known = columns.get("stored_sha256", [None] * len(captions))
        return Pairs(shard_of(source), columns["uid"], columns["key"], captions, known)

    @cached_property
    def _scorers(self) -> dict[str, Scorer]:
        """Those that the recipe asks for, by its name for them."""
        job = self._job
        load_plugins(job.plugins)
        place = Place(self._device, self._threads)
        making = Making(job.spec, place, self._load_clip, job.keys, job.features_sha256)
        return make_scorers(making)

    def _load_clip(self) -> Clip:
        return load_clip(self._clip_source, self._device)

    @property
    def _clip_source(self) -> str | Path:
        assert self._job.spec.clip is not None
        return self._job.spec.clip if self._job.clip is None else fetch_folder(self._job.store, self._job.clip, "clip")
