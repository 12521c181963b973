"""Predicates of `select`, checked: whether a rule fits its column, by name and Arrow type, before any row is read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.recipe.block import MOST
from pipelines.recipe.columns import scored_by
from pipelines.recipe.data import Predicate
from pipelines.recipe.errors import UnknownColumn, UnusableRule

Kind = Literal["text", "number", "bool", "null", "other"]


def require_columns(wanted: Iterable[tuple[str, str]], existing: Iterable[str]) -> None:
    """Raises `UnknownColumn` unless every column of `wanted` (recipe key, column) is among `existing`."""
    columns = list(existing)
    unknown = [(where, column) for where, column in wanted if column not in columns]
    if unknown:
        named = "; ".join(f"{where} names column {column!r}" for where, column in unknown)
        scores = sorted({f"{column} needs {key}" for _, column in unknown if (key := scored_by(column))})
        raise UnknownColumn(
            f"{named}: there is no such column{''.join(f'; {score} in the recipe' for score in scores)}; there are"
            f" {', '.join(sorted(columns))}"
        )


def check_predicate(predicate: Predicate, column_type: Any) -> None:
    """Raises `UnusableRule` unless the predicate's value fits its operation and the column's type."""
    problem = predicate_problem(predicate, column_type)
    if problem is not None:
        raise UnusableRule(f"{_rule(predicate)}: {problem}")


def predicate_problem(predicate: Predicate, column_type: Any) -> str | None:
    """What of the predicate's value does not fit its operation, or the column's type; a null type says nothing."""
    try:
        _check(predicate, column_type)
    except _Unfit as problem:
        return str(problem)
    return None


class _Unfit(Exception):
    """Says what does not fit."""


def _check(predicate: Predicate, column_type: Any) -> None:
    op, value, kind = predicate.op, predicate.value, kind_of_type(column_type)
    if op in {"matches", "not_matches"}:
        _expect(predicate, isinstance(value, str), "a regular expression")
        _expect_kind(predicate, kind, column_type, {"text"})
        try:
            pc.match_substring_regex(pa.nulls(1, pa.string()), value)  # pa.array would import pandas
        except pa.ArrowInvalid as error:
            raise _Unfit(f"{_short(value)} is not a regular expression of RE2 ({error})") from error
    elif op in {"min_chars", "max_chars"}:
        _expect(predicate, kind_of_value(value) == "number" and isinstance(value, int), "a whole number")
        _expect(predicate, 0 <= value < MOST, f"a whole number from 0 to {MOST - 1:,}")
        _expect_kind(predicate, kind, column_type, {"text"})
    elif op in {"in", "not_in"}:
        _expect(predicate, isinstance(value, list | tuple) and len(value) > 0, "a list of at least one value")
        kinds = {kind_of_value(one) for one in value}
        _expect(predicate, len(kinds) == 1, "values of one kind")
        beside_fractions = any(isinstance(one, float) for one in value)
        _expect(predicate, not (beside_fractions and any(map(_is_inexact, value))), "whole numbers, or fractions alone")
        for one in value:
            _expect_fit(predicate, one, kind, column_type)
    else:
        _expect_fit(predicate, value, kind, column_type)
        if op not in {"==", "!="}:
            _expect(predicate, kind_of_value(value) != "bool", "a number or text, since true and false have no order")


def kind_of_type(column_type: Any) -> Kind:
    types = pa.types
    if types.is_string(column_type) or types.is_large_string(column_type) or types.is_string_view(column_type):
        return "text"
    if types.is_boolean(column_type):
        return "bool"
    if types.is_integer(column_type) or types.is_floating(column_type):
        return "number"
    return "null" if types.is_null(column_type) else "other"


def kind_of_value(value: Any) -> Kind:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else "other"


def _expect(predicate: Predicate, holds: bool, expected: str) -> None:
    if not holds:
        raise _Unfit(f"`{predicate.op}` takes {expected}, not {_short(predicate.value)}")


def _expect_kind(predicate: Predicate, kind: Kind, column_type: Any, allowed: set[Kind]) -> None:
    if kind not in allowed | {"null"}:
        raise _Unfit(
            f"`{predicate.op}` works on {' or '.join(sorted(allowed))}, but column {predicate.column!r} is of type"
            f" {column_type}"
        )


def _expect_fit(predicate: Predicate, value: Any, kind: Kind, column_type: Any) -> None:
    found = kind_of_value(value)
    if found == "other" or (isinstance(value, float) and not math.isfinite(value)):
        raise _Unfit(f"`{predicate.op}` compares with text, a finite number, true or false, not {_short(value)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise _Unfit(f"`{predicate.op}` compares with whole numbers from -2^63 to 2^64 - 1, not {_short(value)}")
    _expect_kind(predicate, kind, column_type, {"text", "number", "bool"})
    if kind not in {found, "null"}:
        raise _Unfit(
            f"value {_short(value)} is {_named(found)}, but column {predicate.column!r} is of type {column_type}; give"
            f" {_named(kind)}"
        )


def _is_inexact(value: Any) -> bool:
    """A whole number that no float holds, as it would be beside fractions."""
    return isinstance(value, int) and abs(value) > MOST


def _named(kind: Kind) -> str:
    return {"text": "text", "number": "a number", "bool": "true or false"}.get(kind, kind)


def _rule(predicate: Predicate) -> str:
    return f"select.where: {predicate.name} ({predicate.column} {predicate.op} {_short(predicate.value)})"


def _short(value: Any) -> str:
    return re.sub(r"\s+", " ", repr(value))[:60]
