"""Which rows a report shows, and what it shows of them: image, caption, and the value that decided.

Only the tables' columns of keys are held in memory, and images of a few shards are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from infra.storage import Store
from pipelines.artifacts import Artifact, Unit
from pipelines.dataset.acquired import Shards
from pipelines.dataset.ledgers import read_ledger, shard_of
from pipelines.dataset.scores import Scores
from pipelines.dataset.shards import images_of
from pipelines.pages.page import picture

SHARDS_PER_SAMPLE = 8
"""Rows of a sample come from so many shards at most: a remote shard is fetched whole."""
IMAGE_PX = 64
CAPTION_CHARS = 300
VALUE_CHARS = 60

Place = tuple[str, str]
"""Shard and key."""


@dataclass(frozen=True)
class Shown:
    """A row to show: `image` is a data URI, `values` are its columns as text."""

    caption: str
    image: str
    values: Mapping[str, str]


def sample(rows: Any, count: int) -> Any:
    """`count` of the rows (or all, if there are fewer), drawn evenly from a few shards; the same for the same rows.

    `rows` is a table with `shard`, and perhaps `winner_shard`, for which the same holds as far as there are such rows.
    """
    shards = [
        rows.column(name).to_numpy(zero_copy_only=False).astype(str)
        for name in ("shard", "winner_shard")
        if name in rows.column_names
    ]
    few = _few(np.concatenate(shards))
    within = np.logical_and.reduce([np.isin(each, few) for each in shards])
    if not within.any():
        within, count = np.ones(rows.num_rows, bool), min(count, SHARDS_PER_SAMPLE // 2)
    places = np.flatnonzero(within)
    chosen = np.sort(np.random.default_rng(0).choice(places, min(count, len(places)), replace=False))
    return rows.take(pa.array(chosen))


def _few(shards: NDArray[Any]) -> NDArray[Any]:
    """Some of the shards, by a hash of their name, so that the samples of one report share them."""
    there = np.unique(shards)
    order = np.argsort([hashlib.sha256(shard.encode()).hexdigest() for shard in there.tolist()], kind="stable")
    few: NDArray[Any] = there[order[:SHARDS_PER_SAMPLE].astype(np.int64)]
    return few


def places_of(rows: Any, prefix: str = "") -> list[Place]:
    """Shard and key of each row, of the columns that begin with `prefix`."""
    return list(zip(*(rows.column(f"{prefix}{name}").to_pylist() for name in ("shard", "key")), strict=True))


def load_shown(
    places: Iterable[Place], acquired: Shards, scored: Artifact | None, store: Store, columns: Sequence[str]
) -> dict[Place, Shown]:
    """What is shown of the rows at `places`, with `columns` of their ledger or their scores.

    Raises `pipelines.dataset.errors.UnusableImage` if an image is missing or can't be decoded.
    """
    scores = Scores(scored, store)
    wanted: dict[str, set[str]] = {}
    for shard, key in places:
        wanted.setdefault(shard, set()).add(key)
    found: dict[Place, Shown] = {}
    for unit in acquired.units:
        shard = shard_of(unit)
        keys = sorted(wanted.get(shard, ()))
        if keys:
            values = _values(unit, scores, store, keys, columns)
            for key, row, image in zip(keys, values, images_of(unit, keys, store), strict=True):
                caption = _shortened(row.pop("caption") or "", CAPTION_CHARS)
                texts = {name: value_text(value) for name, value in row.items()}
                found[shard, key] = Shown(caption, picture(image, IMAGE_PX), texts)
    return found


def value_text(value: Any) -> str:
    """A column's value for people."""
    if value is None:
        return "missing"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _shortened(str(value), VALUE_CHARS)


def _values(
    unit: Unit, scores: Scores, store: Store, keys: Sequence[str], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """`caption` and those of `columns` that there are, of each key; a column of the scores hides a ledger's."""
    known: list[dict[str, Any]] = read_ledger(unit, store, ("caption", *columns), keys).drop_columns("key").to_pylist()
    scored = [name for name in columns if name in scores.types and name != "key"]
    if not scored:
        return known
    more = scores.read(shard_of(unit), scored, keys).select(scored).to_pylist()
    return [row | own for row, own in zip(known, more, strict=True)]


def _shortened(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 1] + "…"
