"""Predicates over columns of a ledger: what a rule means, and what is said when it can't be applied.

Pure functions over pyarrow columns. A NaN counts as missing, as a null does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.dataset.split import without_nan
from pipelines.recipe import Predicate
from pipelines.recipe.predicates import kind_of_type

Mask = NDArray[np.bool_]
WHOLE = pa.decimal128(20)
"""Holds all that int64 and uint64 hold."""

COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "==": pc.equal,
    "!=": pc.not_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
    "<": pc.less,
    "<=": pc.less_equal,
}


def passes(column: Any, predicate: Predicate) -> Mask:
    """Which values of the column meet the predicate, `missing` included. The predicate must have been checked."""
    column = without_nan(column)
    valid = _to_numpy(pc.is_valid(column))
    if not valid.any():
        return np.full(len(column), predicate.missing == "keep")
    met = _to_numpy(pc.fill_null(_met(column, predicate), False))
    return np.where(valid, met, predicate.missing == "keep")


def _met(column: Any, predicate: Predicate) -> Any:
    op, value = predicate.op, predicate.value
    if op in COMPARISONS:
        column, values = _alike(column, [value])
        return COMPARISONS[op](column, values[0])
    if op in {"in", "not_in"}:
        column, values = _alike(column, value)
        found = pc.is_in(column, values)
        return found if op == "in" else pc.invert(found)
    column = column.cast(pa.string())
    if op in {"matches", "not_matches"}:
        found = pc.match_substring_regex(column, value)
        return found if op == "matches" else pc.invert(found)
    length = pc.utf8_length(column)
    return pc.greater_equal(length, value) if op == "min_chars" else pc.less_equal(length, value)


def _alike(column: Any, values: Sequence[Any]) -> tuple[Any, Any]:
    """The column and the values as one type, in which they compare as numbers and texts do, without rounding: whole
    numbers as decimals, which hold every 64-bit one, and fractions as float64."""
    kind = kind_of_type(column.type)
    if kind == "number":
        if pa.types.is_integer(column.type) and all(isinstance(value, int) for value in values):
            return column.cast(WHOLE), pa.array([Decimal(value) for value in values], WHOLE)
        return column.cast(pa.float64(), safe=False), pa.array([float(value) for value in values], pa.float64())
    common = pa.string() if kind == "text" else pa.bool_()
    return column.cast(common), pa.array(values, common)


def _to_numpy(mask: Any) -> Mask:
    result: Mask = np.asarray(mask.to_numpy(zero_copy_only=False) if isinstance(mask, pa.Array) else mask.to_numpy())
    return result.astype(bool, copy=False)
