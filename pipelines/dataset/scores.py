"""The published scores: for each shard of `acquire` a part for each scorer, with a row for each kept pair in its
ledger's order.

A part is a unit. Its `scores.parquet` has uid and key, then the scorer's columns; the schema's metadata says what made
them, as JSON under `scorers`. The part of the image features has `features.npy` besides, a row of float16 for each row.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infra.storage import Store
from pipelines.artifacts import Unit, fetch_file
from pipelines.dataset.errors import ScoresDamaged, UnknownScore
from pipelines.dataset.ledgers import shard_of
from pipelines.dataset.tables import open_table, read_table, table_bytes

SCORES, FEATURES = "scores.parquet", "features.npy"
SCORERS_KEY = b"scorers"
ROW_FIELDS = (pa.field("uid", pa.string(), nullable=False), pa.field("key", pa.string(), nullable=False))
ROW_COLUMNS = tuple(field.name for field in ROW_FIELDS)
AGAIN = "score again with `--force score`"


class Scored(Protocol):
    """Parts: an artifact of `score`, or what is to be one."""

    @property
    def units(self) -> Sequence[Unit]: ...


class Identity(TypedDict):
    """What a score depends on beside the pair. `sha256` is of the weights; empty where there are none."""

    model: str
    version: str
    sha256: str


def scores_bytes(columns: Mapping[str, Any], fields: Sequence[Any], scorers: Mapping[str, Identity]) -> bytes:
    """`scores.parquet` of `columns`: uid, key and those of `fields`."""
    metadata = {SCORERS_KEY: json.dumps(scorers, sort_keys=True).encode()}
    schema = pa.schema([*ROW_FIELDS, *fields], metadata=metadata)
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return table_bytes(pa.Table.from_arrays(arrays, schema=schema))


def features_bytes(features: NDArray[np.float16]) -> bytes:
    """`features.npy` of [rows, width]."""
    sink = io.BytesIO()
    np.save(sink, features, allow_pickle=False)
    return sink.getvalue()


class Scores:
    """The scores of an artifact, by shard. Without an artifact there are none."""

    def __init__(self, scored: Scored | None, store: Store) -> None:
        self._store = store
        self._parts: dict[str, dict[str, Unit]] = {}
        """By shard and scorer."""
        for unit in scored.units if scored is not None else ():
            self._parts.setdefault(shard_of(unit), {})[str(unit.info.get("scorer", ""))] = unit

    @property
    def shards(self) -> tuple[str, ...]:
        return tuple(self._parts)

    @cached_property
    def types(self) -> dict[str, Any]:
        """Arrow types of the columns by name, uid and key first. Empty if there are no shards."""
        return {name: column_type for own in self._types.values() for name, column_type in own.items()}

    @property
    def has_features(self) -> bool:
        """Whether there are image features of every shard."""
        return bool(self._parts) and all(self._with_features(shard) is not None for shard in self._parts)

    def check(self, columns: Sequence[str]) -> None:
        """Raises `UnknownScore` if one of `columns` isn't there."""
        unknown = [name for name in columns if name not in self.types]
        if unknown:
            known = ", ".join(self.types) or "none at all"
            raise UnknownScore(f"the scores have no column {unknown[0]!r}, only {known}; ask for it in `score`")

    def read(self, shard: str, columns: Sequence[str], keys: Sequence[str] | None = None) -> Any:
        """A table of the shard's `columns` and `key`: of all its rows, or of those with these keys, in their order.

        Raises `UnknownScore` if one of `columns` isn't there, `ScoresDamaged` if the shard or one of the keys is not.
        """
        self.check(columns)
        if shard not in self._parts:
            raise ScoresDamaged(f"the scores have no shard {shard}; {AGAIN}")
        tables = [
            self._part(shard, scorer, [name for name in columns if name in own and name != "key"])
            for scorer, own in self._types.items()
            if any(name in own for name in columns if name not in ROW_COLUMNS)
        ] or [self._part(shard, next(iter(self._types)), [name for name in columns if name != "key"])]
        table = tables[0]
        for other in tables[1:]:
            if not other.column("key").equals(table.column("key")):
                raise ScoresDamaged(f"the scores of shard {shard} are not of the same pairs; {AGAIN}")
            for name in other.column_names:
                if name not in table.column_names:
                    table = table.append_column(name, other.column(name))
        return table if keys is None else table.take(self._places(shard, table, keys))

    def features(self, wanted: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Features of the pairs `wanted`, given as (shard, key), in that order: float32 [len(wanted), width].

        Raises `UnknownScore` if there are no features, `ScoresDamaged` if a pair has none.
        """
        if not self.has_features:
            raise UnknownScore("the scores hold no image features; set score.features")
        places: dict[str, list[int]] = {}
        for place, (shard, _) in enumerate(wanted):
            places.setdefault(shard, []).append(place)
        found: NDArray[np.float32] = np.zeros((len(wanted), self.width), np.float32)
        for shard, rows in sorted(places.items()):
            if shard not in self._parts:
                raise ScoresDamaged(f"the scores have no shard {shard}; {AGAIN}")
            found[rows] = self._features_of(shard, [wanted[row][1] for row in rows])
        return found

    @cached_property
    def _types(self) -> dict[str, dict[str, Any]]:
        """Types of the columns by scorer, read from the first shard: all have the same."""
        found: dict[str, dict[str, Any]] = {}
        for scorer, unit in next(iter(self._parts.values()), {}).items():
            with open_table(self._store, unit.path(SCORES)) as file:
                found[scorer] = {field.name: field.type for field in file.schema_arrow}
        return found

    def _part(self, shard: str, scorer: str, columns: Sequence[str]) -> Any:
        """A table of key and `columns` out of the scorer's part of the shard."""
        if scorer not in self._parts[shard]:
            raise ScoresDamaged(f"the scores of shard {shard} lack those by {scorer!r}; {AGAIN}")
        path = self._parts[shard][scorer].path(SCORES)
        return read_table(self._store, path, ("key", *columns)).replace_schema_metadata()

    def _with_features(self, shard: str) -> Unit | None:
        return next((unit for unit in self._parts[shard].values() if unit.has(FEATURES)), None)

    def _features_of(self, shard: str, keys: Sequence[str]) -> NDArray[np.float16]:
        unit = self._with_features(shard)
        assert unit is not None
        rows = read_table(self._store, unit.path(SCORES), ["key"])
        places = self._places(shard, rows, keys).to_numpy()
        features = self._array(unit)
        if len(features) != rows.num_rows:
            raise ScoresDamaged(
                f"shard {shard} has {rows.num_rows} rows of scores and {len(features)} of features; {AGAIN}"
            )
        chosen: NDArray[np.float16] = features[places]
        return chosen

    @cached_property
    def width(self) -> int:
        """Width of the features: of the first part with a row, as one without has none to show it."""
        parts = (self._with_features(shard) for shard in self._parts)
        unit = next((unit for unit in parts if unit is not None and unit.counts.kept), None)
        return 0 if unit is None else int(self._array(unit).shape[1])

    def _array(self, unit: Unit) -> NDArray[np.float16]:
        array: NDArray[np.float16] = np.load(fetch_file(self._store, unit, FEATURES), mmap_mode="r", allow_pickle=False)
        return array

    @staticmethod
    def _places(shard: str, table: Any, keys: Sequence[str]) -> Any:
        places = pc.index_in(pa.array(keys, pa.string()), table.column("key").combine_chunks())
        if places.null_count:
            missing = keys[places.is_null().to_pylist().index(True)]
            raise ScoresDamaged(f"shard {shard} has no scores of {missing!r}; {AGAIN}")
        return places


def score_columns(scored: Scored, store: Store) -> dict[str, Any]:
    """Arrow types of the columns by name, uid and key first. Empty if there are no shards."""
    return Scores(scored, store).types


def load_scores(scored: Scored, store: Store, columns: Sequence[str]) -> Any:
    """A table of `columns` and `shard`, a row for each kept pair, shard after shard in their ledgers' order.

    Raises `UnknownScore` if one of `columns` isn't there.
    """
    scores = Scores(scored, store)
    scores.check(columns)
    tables = []
    for shard in scores.shards:
        table = scores.read(shard, columns)
        names = pa.array([shard] * table.num_rows, pa.string())
        tables.append(table.select(list(columns)).append_column("shard", names))
    return pa.concat_tables(tables) if tables else pa.table({"shard": pa.array([], pa.string())})


def load_features(scored: Scored, store: Store, wanted: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
    """`Scores.features`."""
    return Scores(scored, store).features(wanted)
