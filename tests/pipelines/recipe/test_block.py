"""Content: equal for what asks for the same, different for all else, and untouched by what is added neutrally."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from pipelines.recipe.block import MANNER, Block, Neutral


class Inner(Block):
    size: int = 3
    pace: Annotated[float, MANNER] = 1.0


class Circle(Block):
    kind: Literal["circle"]
    radius: float = 1.0


class Square(Block):
    kind: Literal["square"]
    radius: float = 1.0


class Whole(Block):
    ratio: float = 0.0
    flag: bool = False
    zero: int = 0
    names: tuple[str, ...] = ()
    inner: Inner = Inner()
    maybe: Inner | None = None
    shape: Annotated[Circle | Square, Field(discriminator="kind")] = Circle(kind="circle")
    parts: dict[str, Inner] = Field(default_factory=dict)
    anything: Any = None
    renewed: Annotated[str, Neutral("old")] = "new"
    pace: Annotated[int, MANNER] = 1


def content(**values: Any) -> str:
    return json.dumps(Whole.model_validate_json(json.dumps(values)).content(), sort_keys=True)


def test_only_what_is_not_neutral_is_content() -> None:
    assert Whole().content() == {"renewed": "new"}
    assert Whole(renewed="old", pace=7).content() == {}
    assert Whole(renewed="old", inner=Inner(size=4, pace=2.0)).content() == {"inner": {"size": 4}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"ratio": 1}, {"ratio": 1.0}),
        ({"ratio": -0.0}, {"ratio": 0}),
        ({"ratio": 1e3}, {"ratio": 1000}),
        ({"anything": 2}, {"anything": 2.0}),
        ({"anything": 2.0**60}, {"anything": 2**60}),
        ({"anything": {"a": 1, "b": 2}}, {"anything": {"b": 2, "a": 1}}),
        ({"parts": {"a": {}, "b": {}}}, {"parts": {"b": {}, "a": {"size": 3}}}),
        ({"inner": {}}, {}),
        ({"inner": {"pace": 4}}, {}),
        ({"shape": {"kind": "circle"}}, {}),
    ],
)
def test_what_asks_for_the_same_has_one_content(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert content(**one) == content(**other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"maybe": {}}, {"maybe": None}),
        ({"maybe": {}}, {}),
        ({"shape": {"kind": "square"}}, {"shape": {"kind": "circle"}}),
        ({"anything": True}, {"anything": 1}),
        ({"anything": False}, {"anything": 0}),
        ({"anything": [True]}, {"anything": [1]}),
        ({"anything": "1"}, {"anything": 1}),
        ({"anything": None}, {"anything": []}),
        ({"anything": []}, {"anything": {}}),
        ({"anything": [[1], 2]}, {"anything": [1, [2]]}),
        ({"anything": 0.1 + 0.2}, {"anything": 0.3}),
        ({"anything": 2**53}, {"anything": 2**53 + 1}),
        ({"names": ["a", "b"]}, {"names": ["b", "a"]}),
        ({"names": ["a,b"]}, {"names": ["a", "b"]}),
        ({"names": [""]}, {}),
        ({"names": ["é"]}, {"names": ["e\u0301"]}),
        ({"parts": {"a": {}}}, {"parts": {"b": {}}}),
        ({"parts": {"a": {}}}, {}),
        ({"renewed": "old"}, {}),
    ],
)
def test_what_asks_for_something_else_has_another_content(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert content(**one) != content(**other)


def test_a_neutral_value_is_left_out_by_what_it_is_and_not_by_what_python_takes_for_equal() -> None:
    class Loose(Block):
        limit: Any = 0

    assert Loose(limit=0).content() == {}
    assert Loose(limit=False).content() == {"limit": False}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


def same(one: Any, other: Any) -> bool:
    """Whether two JSON values ask for the same: numbers by their value, all else by type and value."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


@given(json_values, json_values)
def test_contents_are_equal_exactly_where_values_are(one: Any, other: Any) -> None:
    first, second = (json.dumps(Whole(anything=value).content(), sort_keys=True) for value in (one, other))
    assert (first == second) == same(one, other)


def test_values_are_of_their_type_finite_and_never_change() -> None:
    for text in ('{"ratio": NaN}', '{"ratio": 1e999}', '{"flag": 1}', '{"zero": 1.0}', '{"unknown": 1}'):
        with pytest.raises(ValidationError):
            Whole.model_validate_json(text)
    with pytest.raises(ValidationError, match="frozen"):
        Whole().zero = 1  # type: ignore[misc]
