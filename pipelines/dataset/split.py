"""The split: on which side each pair is, by a hash of its group alone, so that it never changes with others."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def split_sides(rows: Any, *, by: str, held_out: float, salt: str) -> Any:
    """ "train" or "held_out" for each row: by a hash of salt and group alone, so that it never changes with others.

    A row without a group is its own one.
    """
    groups = pc.cast(without_nan(rows.column(by)), pa.string())
    encoded = pc.coalesce(groups, rows.column("uid")).combine_chunks().dictionary_encode()
    places = np.array([unit_interval(salt, group) for group in encoded.dictionary.to_pylist()], np.float64)
    sides = (places < held_out)[encoded.indices.to_numpy()] if rows.num_rows else np.zeros(0, bool)
    return pc.if_else(pa.array(sides, pa.bool_()), "held_out", "train")


def unit_interval(salt: str, group: str) -> float:
    """A number in [0, 1), evenly spread: the first 53 bits of sha256 of salt, a zero byte and group."""
    first = hashlib.sha256(f"{salt}\0{group}".encode()).digest()[:8]
    return (int.from_bytes(first, "big") >> 11) / 2.0**53


def without_nan(column: Any) -> Any:
    """The column with NaN as null."""
    if not pa.types.is_floating(column.type):
        return column
    return pc.if_else(pc.fill_null(pc.is_nan(column), False), pa.scalar(None, column.type), column)
