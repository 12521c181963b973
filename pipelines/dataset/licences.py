"""Licences and attributions of selected images, as the ledgers state them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.dataset.acquired import Shards
from pipelines.dataset.ledgers import by_shard, read_ledger
from pipelines.dataset.selection import read_selection, rows_by_shard

LICENCE, ATTRIBUTION = "licence", "attribution"
UNKNOWN = "not stated"


def licences(acquired: Shards, selected: Artifact, store: Store) -> Counter[str]:
    """How many selected samples there are of each licence, as the ledgers state it."""
    counted: Counter[str] = Counter()
    for values in _stated(LICENCE, acquired, selected, store):
        for entry in pc.value_counts(pc.fill_null(values, UNKNOWN)).to_pylist():
            counted[entry["values"] or UNKNOWN] += entry["counts"]
    return counted


def attributions(acquired: Shards, selected: Artifact, store: Store) -> set[str]:
    """Names of those whom the ledgers ask to name for the selected samples."""
    stated = _stated(ATTRIBUTION, acquired, selected, store)
    return {value for values in stated for value in values.unique().to_pylist() if value}


def _stated(column: str, acquired: Shards, selected: Artifact, store: Store) -> Iterator[Any]:
    """What each shard's ledger says of its selected samples in a column: strings, null where it says nothing."""
    units = by_shard(acquired)
    for shard, rows in rows_by_shard(read_selection(selected, store, ["shard", "key"])).items():
        ledger = read_ledger(units[shard], store, [column], rows.column("key").to_pylist())
        known = column in ledger.column_names
        yield ledger.column(column).cast(pa.string()) if known else pa.chunked_array([pa.nulls(len(rows), pa.string())])
