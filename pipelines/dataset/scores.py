"""The published scores: a row for each kept pair in its ledger's order, a file for each shard.

`scores.parquet` has uid and key, then the scorers' columns; its schema's metadata says what made them, as JSON under
`scorers`. `features.npy`, where the recipe asks for features, has a row of float16 for each of its rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infra.storage import Store
from pipelines.artifacts import Artifact, Unit
from pipelines.dataset.errors import ScoresDamaged, UnknownScore
from pipelines.dataset.ledgers import by_shard, shard_of

SCORES, FEATURES = "scores.parquet", "features.npy"
SCORERS_KEY = b"scorers"
ROW_FIELDS = (pa.field("uid", pa.string(), nullable=False), pa.field("key", pa.string(), nullable=False))


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
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink, compression="zstd")
    return sink.getvalue()


def features_bytes(features: NDArray[np.float16]) -> bytes:
    """`features.npy` of [rows, width]."""
    sink = io.BytesIO()
    np.save(sink, features, allow_pickle=False)
    return sink.getvalue()


def score_columns(scored: Artifact, store: Store) -> dict[str, Any]:
    """Arrow types of the columns by name, uid and key first. Empty if there are no shards."""
    if not scored.units:
        return {}
    with store.open(scored.units[0].path(SCORES)) as file:
        return {field.name: field.type for field in pq.read_schema(file)}


def load_scores(scored: Artifact, store: Store, columns: Sequence[str]) -> Any:
    """A table of `columns` and `shard`, a row for each kept pair, shard after shard in their ledgers' order.

    Raises `UnknownScore` if one of `columns` isn't there.
    """
    types = score_columns(scored, store)
    unknown = [name for name in columns if name not in types]
    if unknown:
        raise UnknownScore(f"the scores have no column {unknown[0]!r}, only {', '.join(types)}; ask for it in `score`")
    tables = []
    for unit in scored.units:
        with store.open(unit.path(SCORES)) as file:
            table = pq.read_table(file, columns=list(columns)).replace_schema_metadata()
        rows = table.num_rows if columns else unit.counts.kept
        tables.append(table.append_column("shard", pa.array([shard_of(unit)] * rows, pa.string())))
    return pa.concat_tables(tables)


def load_features(scored: Artifact, store: Store, wanted: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
    """Features of the pairs `wanted`, given as (shard, key), in that order: float32 [len(wanted), width].

    Raises `UnknownScore` if there are no features, `ScoresDamaged` if a pair has none.
    """
    units = by_shard(scored)
    if any(all(entry.name != FEATURES for entry in unit.files) for unit in units.values()):
        raise UnknownScore("the scores hold no image features; set score.features")
    places: dict[str, list[int]] = {}
    for place, (shard, _) in enumerate(wanted):
        places.setdefault(shard, []).append(place)
    found: NDArray[np.float32] = np.zeros((len(wanted), _width(scored, store)), np.float32)
    for shard, rows in sorted(places.items()):
        if shard not in units:
            raise ScoresDamaged(f"the scores have no shard {shard}; score again with `--force score`")
        found[rows] = _features_of(units[shard], store, [wanted[row][1] for row in rows])
    return found


def _features_of(unit: Unit, store: Store, keys: Sequence[str]) -> NDArray[np.float16]:
    with store.open(unit.path(SCORES)) as file:
        known = pq.read_table(file, columns=["key"]).column("key").combine_chunks()
    rows = pc.index_in(pa.array(keys, pa.string()), known)
    if rows.null_count:
        missing = keys[rows.is_null().to_pylist().index(True)]
        raise ScoresDamaged(f"shard {shard_of(unit)} has no scores of {missing!r}; score again with `--force score`")
    features: NDArray[np.float16] = np.load(store.fetch(unit.path(FEATURES)), mmap_mode="r", allow_pickle=False)
    if len(features) != len(known):
        raise ScoresDamaged(
            f"shard {shard_of(unit)} has {len(known)} rows of scores and {len(features)} of features; score again with"
            " `--force score`"
        )
    chosen: NDArray[np.float16] = features[rows.to_numpy()]
    return chosen


def _width(scored: Artifact, store: Store) -> int:
    if not scored.units:
        return 0
    features = np.load(store.fetch(scored.units[0].path(FEATURES)), mmap_mode="r", allow_pickle=False)
    return int(features.shape[1])
