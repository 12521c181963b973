"""Rules compare as Python does, whatever a column's Arrow type is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from pipelines.recipe import Predicate
from pipelines.recipe.predicates import predicate_problem
from pipelines.select.predicates import passes

OPERATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "in": lambda one, values: one in values,
    "not_in": lambda one, values: one not in values,
}
WHOLE = {
    pa.uint64(): [0, 3, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1],
    pa.int64(): [-(2**63), -1, 3, 2**53 + 1, 2**63 - 1],
    pa.uint8(): [0, 3, 255],
    pa.int16(): [-7, 3],
}
FRACTIONS = {
    pa.float16(): [-1.5, 0.25, 3.0],
    pa.float32(): [-1.5, 0.25, 3.0, float(2**24), 1e30],
    pa.float64(): [-1.5, 0.1, 3.0, float(2**53)],
}
VALUES = [-(2**63), -1, 0, 3, 255, 2**24, 2**24 + 1, 2**53 - 1, 2**63 - 1, 2**63, 2**64 - 1, 0.25, 3.0, 0.1, -1.5, 1e30]


def rule(op: str, value: Any) -> Predicate:
    return Predicate.model_validate({"name": "rule", "column": "x", "op": op, "value": value})


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("kind", [*WHOLE, *FRACTIONS], ids=str)
def test_numbers_compare_as_numbers(kind: Any, op: str) -> None:
    values = (WHOLE | FRACTIONS)[kind]
    column = pa.array(values).cast(kind) if kind in FRACTIONS else pa.array(values, kind)
    column = pa.concat_arrays([column, pa.nulls(1, kind)])
    held = column.to_pylist()
    for value in VALUES:
        asked = [value] if op in {"in", "not_in"} else value
        predicate = rule(op, asked)
        assert predicate_problem(predicate, kind) is None, (value, predicate_problem(predicate, kind))
        expected = [one is not None and OPERATIONS[op](one, asked) for one in held]
        assert passes(column, predicate).tolist() == expected, (op, value)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_texts_compare_as_texts(kind: Any) -> None:
    column = pa.array(["apple", "Pear", "", None], kind)
    for op, value, expected in (
        ("==", "Pear", [False, True, False, False]),
        ("<", "a", [False, True, True, False]),
        ("in", ["apple", "Pear"], [True, True, False, False]),
        ("not_in", ["apple"], [False, True, True, False]),
        ("matches", "^[a-z]+$", [True, False, False, False]),
        ("not_matches", "p", [False, True, True, False]),
        ("min_chars", 5, [True, False, False, False]),
        ("max_chars", 4, [False, True, True, False]),
    ):
        assert predicate_problem(rule(op, value), kind) is None
        assert passes(column, rule(op, value)).tolist() == expected, (op, value)


def test_true_and_false_compare_alone() -> None:
    column = pa.array([True, False, None])
    assert passes(column, rule("==", True)).tolist() == [True, False, False]
    assert passes(column, rule("in", [False])).tolist() == [False, True, False]


@pytest.mark.parametrize("value", [2**64, -(2**63) - 1])
def test_a_number_that_no_column_holds_is_refused(value: int) -> None:
    assert "2^64 - 1" in str(predicate_problem(rule("==", value), pa.uint64()))
