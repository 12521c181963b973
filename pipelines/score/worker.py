"""A process that scores shards: loads what the recipe's scorers need once, publishes one unit a shard.

Runs as a Ray actor; knows nothing of Ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infra.storage import Store
from ldm.features import FeatureExtractor, load_extractor
from pipelines.actors import batched
from pipelines.artifacts import Counts, Unit, fetch_folder
from pipelines.building import publish_unit
from pipelines.dataset.ledgers import kept_ledger, shard_of
from pipelines.dataset.scores import FEATURES, SCORES, Identity, features_bytes, scores_bytes
from pipelines.dataset.shards import images_of
from pipelines.recipe import ScoreSpec
from pipelines.score.errors import ScoreError
from pipelines.score.scorer import Pixels, Scorer, by_shape

Features = NDArray[np.float16]


@dataclass(frozen=True)
class ScoreJob:
    """What every shard is scored with, and where its units go. `clip` is of a CLIP that the recipe trains."""

    store: Store
    node: str
    spec: ScoreSpec
    clip: Unit | None


@dataclass(frozen=True)
class ScoreTask:
    """One unit of work: a shard of `acquire`."""

    source: Unit
    unit_key: str

    @property
    def shard(self) -> str:
        return shard_of(self.source)

    @property
    def num_images(self) -> int:
        return self.source.counts.kept


class ShardScorer:
    """Scores one shard after another. Networks are loaded by the first call, so that it raises their errors."""

    def __init__(self, job: ScoreJob, device: str, threads: int) -> None:
        self._job = job
        self._device = device
        self._threads = min(threads, len(os.sched_getaffinity(0)))
        torch.set_num_threads(self._threads)

    def identities(self) -> dict[str, Identity]:
        """What the pairs are scored with, by the recipe's name for it."""
        known = {name: scorer.identity for name, scorer in self._scorers.items()}
        if self._extractor is not None:
            extractor = self._extractor
            known["features"] = {"model": extractor.name, "version": "1", "sha256": extractor.sha256}
        return known

    def score(self, task: ScoreTask) -> Unit:
        """Score and publish the kept pairs of one shard.

        Raises `pipelines.dataset.errors.UnusableImage` if an image is missing or can't be decoded, `ScoreError` if its
        features are not numbers.
        """
        job = self._job
        kept = kept_ledger(task.source, job.store, ["uid", "key", "caption"])
        columns: dict[str, list[Any]] = {name: kept.column(name).to_pylist() for name in ("uid", "key")}
        columns |= {field.name: [] for field in self._fields}
        features: list[Features] = []
        captions = [caption or "" for caption in kept.column("caption").to_pylist()]
        images = images_of(task.source, columns["key"], job.store)
        for batch in batched(zip(images, captions, columns["key"], strict=True), job.spec.batch_size):
            pixels, texts, keys = zip(*batch, strict=True)
            for scorer in self._scorers.values():
                for name, values in scorer(pixels, texts).items():
                    columns[name] += list(values)
            if self._extractor is not None:
                features.append(self._features(task, pixels, keys))
        files = {SCORES: scores_bytes(columns, self._fields, self.identities())}
        if self._extractor is not None:
            files[FEATURES] = features_bytes(np.concatenate([np.zeros((0, self._extractor.width), "f2"), *features]))
        counts = Counts(len(captions), len(captions))
        info = {"shard": task.shard, "content": task.unit_key}
        return publish_unit(job.store, job.node, task.unit_key, files, counts, info)

    @property
    def _fields(self) -> list[Any]:
        return [field for scorer in self._scorers.values() for field in scorer.fields]

    @cached_property
    def _scorers(self) -> dict[str, Scorer]:
        """Those that the recipe asks for, by its name for them."""
        spec, scorers = self._job.spec, dict[str, Scorer]()
        if spec.clip is not None:
            from pipelines.score.clip import ClipSimilarity

            trained = self._job.clip
            source = spec.clip if trained is None else fetch_folder(self._job.store, trained, "clip")
            scorers["clip"] = ClipSimilarity(source, self._device)
        if spec.nsfw:
            from pipelines.score.nsfw import OpenNsfw

            scorers["nsfw"] = OpenNsfw(self._threads)
        if spec.phash:
            from pipelines.score.phash import PerceptualHash

            scorers["phash"] = PerceptualHash()
        return scorers

    @cached_property
    def _extractor(self) -> FeatureExtractor | None:
        name = self._job.spec.features
        return None if name is None else load_extractor(name, self._device)

    def _features(self, task: ScoreTask, images: Sequence[Pixels], keys: Sequence[str]) -> Features:
        assert self._extractor is not None
        features: Features = by_shape(images, self._extractor).astype(np.float16)
        unusable = ~np.isfinite(features).all(axis=1)
        if unusable.any():
            raise ScoreError(
                f"image {keys[int(unusable.argmax())]!r} of shard {task.shard} has features that are not numbers in"
                f" float16 ({self._extractor.name}); look at the image, or leave out score.features"
            )
        return features
