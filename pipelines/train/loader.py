"""Rows of a latent cache as tensors, by number: each memory-mapped file is opened when a row of it is first read.

A file is refused if it was not made with what the model is to be trained with. The files' format is the stage
`encode`'s matter; which rows, in which order, is `order`'s.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infra.storage import Store
from pipelines.artifacts import Unit, fetch_file
from pipelines.dataset.cache import CacheSchema, open_cache
from pipelines.dataset.errors import UnusableData
from pipelines.dataset.samples import sample_id

CACHE_SUFFIX = ".arrow"


@dataclass(frozen=True)
class CacheBatch:
    """Some rows of the cache. `moments` are [B, 2C, h, w], mean then log-variance, unscaled; `text` is [B, L, D]."""

    sample_ids: list[int]
    moments: torch.Tensor
    text: torch.Tensor


class LatentCache:
    """The rows of one split, numbered through the units of an `encode` artifact in their order.

    `binding` is what the files must have been made with: values by field name of `CacheSchema`.
    """

    def __init__(
        self, store: Store, units: Sequence[Unit], binding: Mapping[str, Any], *, split: str = "train"
    ) -> None:
        """Raises `UnusableData` if no row is of the split."""
        self._store = store
        self._units = [unit for unit in units if not unit.info.get("null") and unit.info[split] > 0]
        self._null = next((unit for unit in units if unit.info.get("null")), None)
        self._binding = dict(binding)
        self._split = split
        self._first_rows = [0, *accumulate(int(unit.info[split]) for unit in self._units)]
        self._open: dict[int, _Rows] = {}
        if not self._units:
            raise UnusableData(f"the cache has no {split} samples; select more")

    def __len__(self) -> int:
        return self._first_rows[-1]

    @property
    def schema(self) -> CacheSchema:
        """What the first file says it was made with. Raises as `rows` does."""
        return self._file(0).schema

    def rows(self, rows: Sequence[int]) -> CacheBatch:
        """Copies of the rows, float16.

        Raises:
            pipelines.dataset.errors.CacheMismatch: a file was made with something else than the binding says.
            pipelines.dataset.errors.CacheDamaged: a file is no cache.
            infra.storage.FileDamaged: a file is not what was recorded.
            UnusableData: a file has other rows than its record says.
        """
        places = [bisect_right(self._first_rows, row) - 1 for row in rows]
        found = [self._file(at).row(row - self._first_rows[at]) for at, row in zip(places, rows, strict=True)]
        ids, moments, text = zip(*found, strict=True)
        return CacheBatch(list(ids), torch.from_numpy(np.stack(moments)), torch.from_numpy(np.stack(text)))

    def null_text(self) -> torch.Tensor:
        """The text states of the empty prompt, float16 [L, D]. Raises as `rows` does."""
        if self._null is None:
            raise UnusableData("the cache has no row for the empty prompt; make it again with `--force encode.<model>`")
        file = open_cache(fetch_file(self._store, self._null, CACHE_SUFFIX), self._binding)
        return torch.from_numpy(file.text()[0][0].copy())

    def _file(self, at: int) -> _Rows:
        if at not in self._open:
            self._open[at] = _Rows(self._store, self._units[at], self._binding, self._split)
        return self._open[at]


class _Rows:
    """The rows of one split in one file: views, and where they are."""

    def __init__(self, store: Store, unit: Unit, binding: Mapping[str, Any], split: str) -> None:
        file = open_cache(fetch_file(store, unit, CACHE_SUFFIX), binding)
        self.schema = file.schema
        in_split = np.flatnonzero(np.array(file.strings("split")) == split)
        if len(in_split) != unit.info[split]:
            raise UnusableData(
                f"{store.location(unit.only(CACHE_SUFFIX))} has {len(in_split)} {split} rows, its record says"
                f" {unit.info[split]}; make it again with `--force {unit.stage}`"
            )
        uids = file.strings("uid")
        self._ids = [sample_id(uids[row]) for row in in_split]
        self._moments, self._text = file.moments(), file.text()
        first_rows = [0, *accumulate(len(views) for views in self._moments)]
        chunks = [bisect_right(first_rows, row) - 1 for row in in_split]
        self._places = [(chunk, int(row) - first_rows[chunk]) for chunk, row in zip(chunks, in_split, strict=True)]

    def row(self, row: int) -> tuple[int, NDArray[np.float16], NDArray[np.float16]]:
        chunk, place = self._places[row]
        return self._ids[row], self._moments[chunk][place], self._text[chunk][place]
