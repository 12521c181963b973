"""The values of one scorer for one shard: copied from earlier parts, the rest computed; then written as a part."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from infra.storage import Store
from pipelines.dataset.earlier import INPUTS, UNREADABLE, Copied, Inputs, inputs_bytes, inputs_of, recorded_file
from pipelines.dataset.facts import PartFacts
from pipelines.dataset.scores import FEATURES, SCORES, Identity, features_bytes, scores_bytes
from pipelines.score.errors import ScoreError
from pipelines.score.scorer import Pixels, Scorer

FEATURES_VALUE = "features"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A unit to be made: one scorer's values for one shard, and which of its rows earlier units have."""

    scorer: str
    identity: Identity
    made_with: str
    content: str
    unit_key: str
    copied: Sequence[Copied] = ()


@dataclass(frozen=True)
class Pairs:
    """The kept pairs of one shard, in its ledger's order."""

    shard: str
    uid: Sequence[str]
    key: Sequence[str]
    caption: Sequence[str]
    stored_sha256: Sequence[str | None]

    def inputs(self, scorer: Scorer) -> Inputs:
        """What the scorer sees of each pair, as hashes."""
        return inputs_of(self.stored_sha256, *([self.caption] if scorer.reads_captions else []))


class PartValues:
    """`missing` are the rows that have no values yet."""

    def __init__(self, part: Part, scorer: Scorer, pairs: Pairs) -> None:
        self.part = part
        self.missing = set(range(len(pairs.key)))
        self._scorer = scorer
        self._pairs = pairs
        names = [field.name for field in scorer.fields] or [FEATURES_VALUE]
        self._values: dict[str, list[Any]] = {name: [None] * len(pairs.key) for name in names}
        self._computed = 0

    def copy(self, store: Store) -> None:
        """Take over what the part says is in earlier units, as far as it can be read and is what was recorded."""
        for copied in self.part.copied:
            try:
                self._take(copied.here.tolist(), self._earlier(copied, store))
            except (*UNREADABLE, LookupError) as error:
                logger.warning("rows of unit %s are scored again, not copied: %s", copied.unit.key, error)

    def compute(self, batch: Sequence[tuple[int, Pixels]]) -> None:
        """Score those of the batch (row and image) that are missing. Raises `ScoreError` for NaN and infinite
        values."""
        rows = [row for row, _ in batch if row in self.missing]
        if not rows:
            return
        images = [image for row, image in batch if row in self.missing]
        values = self._scorer(images, [self._pairs.caption[row] for row in rows])
        self._check(rows, values)
        self._take(rows, values)
        self._computed += len(rows)

    def files(self) -> dict[str, bytes]:
        """What is published, by name."""
        pairs, part = self._pairs, self.part
        columns = {"uid": pairs.uid, "key": pairs.key, **self._values}
        files = {
            SCORES: scores_bytes(columns, self._scorer.fields, {part.scorer: part.identity}),
            INPUTS: inputs_bytes(pairs.inputs(self._scorer)),
        }
        if FEATURES_VALUE in self._values:
            rows = self._values[FEATURES_VALUE]
            files[FEATURES] = features_bytes(np.stack(rows) if rows else np.zeros((0, 0), np.float16))
        return files

    def facts(self) -> PartFacts:
        return PartFacts(
            shard=self._pairs.shard,
            content=self.part.content,
            made_with=self.part.made_with,
            computed=self._computed,
            copied=len(self._pairs.key) - self._computed,
            scorer=self.part.scorer,
        )

    def _earlier(self, copied: Copied, store: Store) -> Mapping[str, Sequence[Any]]:
        if FEATURES_VALUE in self._values:
            features = np.load(recorded_file(store, copied.unit, FEATURES), mmap_mode="r", allow_pickle=False)
            return {FEATURES_VALUE: features[copied.there]}
        file = pq.ParquetFile(recorded_file(store, copied.unit, SCORES), pre_buffer=False)
        table = file.read(list(self._values), use_threads=False).take(copied.there)
        return {name: table.column(name).to_pylist() for name in self._values}

    def _take(self, rows: Sequence[int], values: Mapping[str, Sequence[Any]]) -> None:
        for name, own in self._values.items():
            for row, value in zip(rows, values[name], strict=True):
                own[row] = value
        self.missing -= set(rows)

    def _check(self, rows: Sequence[int], values: Mapping[str, Any]) -> None:
        for name, own in values.items():
            numbers = np.asarray(own)
            if numbers.dtype.kind != "f":
                continue
            unusable = ~np.isfinite(numbers.reshape(len(rows), -1)).all(axis=1)
            if unusable.any():
                key, part = self._pairs.key[rows[int(unusable.argmax())]], self.part
                raise ScoreError(
                    f"{name} of image {key!r} of shard {self._pairs.shard} are not numbers in {numbers.dtype}"
                    f" ({part.identity['model']}); look at the image, or leave out score.{part.scorer}"
                )
