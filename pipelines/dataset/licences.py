"""Licences and attributions of selected images, as the ledgers state them."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pyarrow.compute as pc

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.dataset.ledgers import read_ledger, shard_of
from pipelines.dataset.selection import read_selection

LICENCE, ATTRIBUTION = "licence", "attribution"
UNKNOWN = "not stated"


def licences(acquired: Artifact, selected: Artifact, store: Store) -> Counter[str]:
    """How many selected samples there are of each licence, as the ledgers state it."""
    selection = read_selection(selected, store, ["shard", "key"])
    counted: Counter[str] = Counter()
    for unit in acquired.units:
        keys = selection.filter(pc.equal(selection.column("shard"), shard_of(unit))).column("key")
        rows = read_ledger(unit, store, [LICENCE], keys.to_pylist())
        if LICENCE not in rows.column_names:
            counted[UNKNOWN] += len(keys)
            continue
        used = rows.column(LICENCE).cast(pa.string())
        for entry in pc.value_counts(pc.fill_null(used, UNKNOWN)).to_pylist():
            counted[entry["values"] or UNKNOWN] += entry["counts"]
    return counted


def attributions(acquired: Artifact, store: Store) -> set[str]:
    """Whom the ledgers ask to name."""
    found: set[str] = set()
    for unit in acquired.units:
        rows = read_ledger(unit, store, [ATTRIBUTION])
        if ATTRIBUTION in rows.column_names:
            found |= {str(value) for value in rows.column(ATTRIBUTION).unique().to_pylist() if value}
    return found
