"""The published selection: which pairs are used, on which side of the split, and why the others are not.

`selection.parquet` has uid, shard, key and split, `dropped.parquet` uid, shard, key and reason;
`near_duplicates.parquet` has the rows that went for another, beside the one that stays. All are sorted by shard and
key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.dataset.tables import read_table

Side = Literal["train", "held_out"]
SIDES: tuple[Side, ...] = ("train", "held_out")
SELECTION, DROPPED, NEAR_DUPLICATES = "selection.parquet", "dropped.parquet", "near_duplicates.parquet"
ROW_COLUMNS = ("uid", "shard", "key")
NEAR_DUPLICATE = "near_duplicate"
"""The reason of those that look like another."""


def read_selection(selected: Artifact, store: Store, columns: Sequence[str], split: Side | None = None) -> Any:
    """A table of the selected pairs, of one side of the split or of both."""
    table = _read(selected, store, SELECTION, (*columns, *(["split"] if split is not None else [])))
    if split is not None:
        table = table.filter(pc.equal(table.column("split"), split))
    return table.select(list(columns))


def read_dropped(selected: Artifact, store: Store, columns: Sequence[str]) -> Any:
    """A table of the pairs that a rule dropped."""
    return _read(selected, store, DROPPED, columns)


def read_near_duplicates(selected: Artifact, store: Store, columns: Sequence[str]) -> Any | None:
    """A table of the pairs that look like another, or None where the rules don't ask for them."""
    (unit,) = selected.units
    if not unit.has(NEAR_DUPLICATES):
        return None
    return _read(selected, store, NEAR_DUPLICATES, columns)


def rows_by_shard(rows: Any) -> dict[str, Any]:
    """The rows of each shard that has some; `rows` is a table with `shard`, by which it is sorted."""
    shards = rows.column("shard").to_numpy(zero_copy_only=False).astype(str)
    names, first, counts = np.unique(shards, return_index=True, return_counts=True)
    places = zip(names.tolist(), first.tolist(), counts.tolist(), strict=True)
    return {name: rows.slice(begin, count) for name, begin, count in places}


def _read(selected: Artifact, store: Store, name: str, columns: Sequence[str]) -> Any:
    (unit,) = selected.units
    return read_table(store, unit.path(name), columns)
