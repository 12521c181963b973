"""Predicates, duplicates and the split, as functions of tables."""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings

from pipelines.dataset.split import split_sides
from pipelines.recipe import Predicate, SelectSpec, Split
from pipelines.recipe.errors import UnknownColumn, UnusableRule
from pipelines.select.errors import NothingSelected
from pipelines.select.predicates import passes
from pipelines.select.select import check_rules, choose, duplicates, needed_columns


def rows_of(**columns: Any) -> pa.Table:
    """Rows with the columns given; uid, shard, key and sizes made up where they are not."""
    n = len(next(iter(columns.values())))
    defaults = {
        "uid": [f"{i:04x}" for i in range(n)],
        "shard": ["00000"] * n,
        "key": [f"{i:09d}" for i in range(n)],
        "original_width": pa.array([100] * n, pa.int32()),
        "original_height": pa.array([100] * n, pa.int32()),
    }
    return pa.table(defaults | columns)


def kept_by(op: str, value: Any, column: Any, missing: str = "drop") -> list[int]:
    predicate = Predicate(name="rule", column="c", op=op, value=value, missing=missing)  # type: ignore[arg-type]
    return list(np.flatnonzero(passes(pa.chunked_array([pa.array(column)]), predicate)))


@pytest.mark.parametrize(
    ("op", "value", "column", "expected"),
    [
        ("==", "cc0", ["cc0", "by", None], [0]),
        ("!=", "cc0", ["cc0", "by", None], [1]),
        ("==", True, [True, False, None], [0]),
        (">", 2, [1, 2, 3, None], [2]),
        (">=", 2, [1, 2, 3, None], [1, 2]),
        ("<", 2.5, [1, 2, 3, None], [0, 1]),
        ("<=", 0.28, [0.1, 0.28, 0.3, float("nan")], [0, 1]),
        ("!=", 0.1, [0.1, 0.28, float("nan")], [1]),
        (">=", "2024-01-01", ["2023-12-31", "2024-01-01", None], [1]),
        ("in", ["a", "b"], ["a", "c", None, "b"], [0, 3]),
        ("not_in", ["a", "b"], ["a", "c", None, "b"], [1]),
        ("in", [1, 2.5], [1, 2, 3], [0]),
        ("in", [1, 2], [1.0, 1.5, 2.0], [0, 2]),
        ("matches", "^flag", ["flag of France", "a flag", None], [0]),
        ("not_matches", "(?i)FLAG", ["flag of France", "face", None], [1]),
        ("min_chars", 2, ["é", "éa", "", None], [1]),
        ("max_chars", 1, ["é", "éa", "", None], [0, 2]),
    ],
)
def test_operations(op: str, value: Any, column: list[Any], expected: list[int]) -> None:
    assert kept_by(op, value, column) == expected


def test_missing_values_go_or_stay_as_the_rule_says() -> None:
    assert kept_by(">", 0.5, [0.6, None, float("nan"), 0.4], missing="drop") == [0]
    assert kept_by(">", 0.5, [0.6, None, float("nan"), 0.4], missing="keep") == [0, 1, 2]
    assert kept_by("not_in", ["x"], ["x", None], missing="keep") == [1]
    assert kept_by(">", 0.5, pa.nulls(2), missing="keep") == [0, 1]
    assert kept_by(">", 0.5, pa.nulls(2), missing="drop") == []


def spec_with(**where: Any) -> SelectSpec:
    return SelectSpec(where=(Predicate(**({"name": "rule", "column": "caption", "op": "=="} | where)),))


TYPES = {"uid": pa.string(), "sha256": pa.string(), "caption": pa.string(), "width": pa.int32(), "ok": pa.bool_()}
TYPES |= {"tags": pa.list_(pa.string()), "empty": pa.null()}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"value": 3}, "is a number, but column 'caption' is of type string; give text"),
        ({"value": None}, "compares with text"),
        ({"column": "width", "op": ">", "value": "200"}, "is text, but column 'width' is of type int32"),
        ({"column": "width", "op": ">", "value": float("nan")}, "compares with"),
        ({"column": "width", "op": ">", "value": 2**64}, "compares with"),
        ({"column": "ok", "op": ">", "value": True}, "have no order"),
        ({"column": "ok", "value": 1}, "give true or false"),
        ({"column": "tags", "value": "x"}, "is of type list"),
        ({"op": "in", "value": []}, "a list of at least one value"),
        ({"op": "in", "value": "abc"}, "a list of at least one value"),
        ({"op": "not_in", "value": ["a", 1]}, "values of one kind"),
        ({"op": "matches", "value": "(("}, "not a regular expression"),
        ({"column": "width", "op": "matches", "value": "1"}, "works on text"),
        ({"op": "max_chars", "value": -1}, "a whole number"),
        ({"op": "max_chars", "value": 2.5}, "a whole number"),
        ({"column": "empty", "op": "min_chars", "value": "3"}, "a whole number"),
    ],
)
def test_value_that_does_not_fit_is_refused(where: dict[str, Any], message: str) -> None:
    with pytest.raises(UnusableRule, match=r"select\.where: rule .*") as caught:
        check_rules(spec_with(**where), TYPES)
    assert message in str(caught.value)


def test_unknown_columns_are_named_with_those_that_there_are() -> None:
    spec = SelectSpec(
        duplicates=("phash",),
        where=(Predicate(name="clip", column="clip_score", op=">", value=0.3),),
        split=Split(by="group"),
    )
    with pytest.raises(UnknownColumn) as caught:
        check_rules(spec, {"uid": pa.string(), "caption": pa.string()})
    message = str(caught.value)
    assert all(word in message for word in ("'clip_score'", "'phash'", "'group'", "caption, uid", "select.split.by"))


def test_only_needed_columns_are_asked_for() -> None:
    spec = spec_with(op="min_chars", value=1)
    assert needed_columns(spec) == ["uid", "key", "original_width", "original_height", "caption", "sha256"]


def test_largest_original_stays_then_lowest_uid() -> None:
    rows = rows_of(
        uid=["d", "c", "b", "a", "f", "e"],
        sha256=["same", "same", "same", "other", "pair", "pair"],
        original_width=pa.array([10, 20, 20, 5, None, None], pa.int32()),
    )
    assert list(np.flatnonzero(duplicates(rows, "sha256"))) == [0, 1, 4]


def test_product_of_sides_does_not_overflow() -> None:
    rows = rows_of(
        sha256=["s", "s"],
        original_width=pa.array([70_000, 60_000], pa.int32()),
        original_height=pa.array([70_000, 1], pa.int32()),
    )
    assert list(duplicates(rows, "sha256")) == [False, True]


def test_nulls_and_nan_are_no_duplicates() -> None:
    assert not duplicates(rows_of(c=[None, None, "x"]), "c").any()
    assert not duplicates(rows_of(c=[float("nan"), float("nan"), 1.0]), "c").any()
    assert not duplicates(rows_of(c=pa.nulls(3)), "c").any()


def test_a_dropped_row_does_not_shadow_a_good_one() -> None:
    rows = rows_of(
        sha256=["s", "s"], caption=["x" * 200, "short"], original_width=pa.array([900, 10], pa.int32()), uid=["a", "b"]
    )
    spec = SelectSpec(
        where=(Predicate(name="too_long", column="caption", op="max_chars", value=100),), split=Split(held_out=0.0)
    )
    selection = choose(rows, spec)
    assert selection.selected.column("uid").to_pylist() == ["b"]
    assert selection.reasons == {"too_long": 1}


def test_first_rule_that_a_row_fails_is_its_reason() -> None:
    rows = rows_of(sha256=["a", "b", "c", "c"], n=[1, 5, 9, 9])
    spec = SelectSpec(
        where=(
            Predicate(name="above_two", column="n", op=">", value=2),
            Predicate(name="above_six", column="n", op=">", value=6),
        ),
        split=Split(held_out=0.0),
    )
    selection = choose(rows, spec)
    assert selection.dropped.column("reason").to_pylist() == ["above_two", "above_six", "duplicate_sha256"]
    assert selection.selected.column("key").to_pylist() == ["000000002"]


def test_of_one_uid_a_single_row_stays_whatever_the_rules_say() -> None:
    rows = rows_of(
        uid=["a", "a", "a", "b", "b"],
        shard=["s1", "s2", "s3", "s2", "s1"],
        caption=["x", "x", "too long", "x", "x"],
        original_width=pa.array([50, 90, 99, 70, 70], pa.int32()),
        sha256=["1", "2", "3", "2", "5"],
    )
    short = Predicate(name="long", column="caption", op="max_chars", value=5)
    spec = SelectSpec(duplicates=(), where=(short,), split=Split(held_out=0.0))
    selection = choose(rows, spec)
    assert selection.selected.select(["uid", "shard"]).to_pylist() == [
        {"uid": "b", "shard": "s1"},
        {"uid": "a", "shard": "s2"},
    ]
    assert selection.reasons == {"long": 1, "repeated": 2}
    # What is dropped as repeated shadows nobody: the second "b" has the image of the "a" that stays.
    assert choose(rows, SelectSpec(where=(short,), split=Split(held_out=0.0))).reasons == selection.reasons


def test_nothing_left_says_why() -> None:
    rows = rows_of(sha256=["a", "a", "b"], caption=["one", "two", "three"])
    with pytest.raises(NothingSelected, match=r"of 3 pairs all are dropped \(long 3\)"):
        choose(rows, spec_with(name="long", op="min_chars", value=50))
    with pytest.raises(NothingSelected, match=r"held out; lower select\.split\.held_out \(1\.0\)"):
        choose(rows, SelectSpec(split=Split(held_out=1.0)))
    with pytest.raises(NothingSelected, match="acquire"):
        choose(rows.slice(0, 0), SelectSpec())


groups = st.one_of(st.none(), st.sampled_from(["cat", "dog", "flag of France", "é", ""]))
table_rows = st.lists(
    st.tuples(groups, st.sampled_from(["h1", "h2", "h3", None]), st.integers(1, 3), st.integers(0, 2)),
    min_size=1,
    max_size=24,
)


def table_of(rows: list[tuple[str | None, str | None, int, int]]) -> pa.Table:
    return rows_of(
        group=pa.array([row[0] for row in rows], pa.string()),
        sha256=pa.array([row[1] for row in rows], pa.string()),
        original_width=pa.array([row[2] for row in rows], pa.int32()),
        shard=pa.array([row[3] for row in rows], pa.int32()),
    )


@given(rows=table_rows, data=st.data())
@settings(max_examples=60, deadline=None)
def test_selection_does_not_depend_on_the_order_of_rows(rows: list[Any], data: st.DataObject) -> None:
    table = table_of(rows)
    spec = SelectSpec(split=Split(by="group", held_out=0.0))
    shuffled = table.take(pa.array(data.draw(st.permutations(range(len(rows))))))
    first, second = choose(table, spec), choose(shuffled, spec)
    assert first.selected.equals(second.selected)
    assert first.dropped.equals(second.dropped)
    assert first.selected.num_rows + first.dropped.num_rows == len(rows)


@given(rows=table_rows)
@settings(max_examples=60, deadline=None)
def test_exactly_the_best_of_each_value_stays(rows: list[Any]) -> None:
    table = table_of(rows)
    selection = choose(table, SelectSpec(split=Split(by="group", held_out=0.0)))
    best: dict[str, tuple[int, str]] = {}
    expected = set()
    for (_, value, width, _), uid in zip(rows, table.column("uid").to_pylist(), strict=True):
        if value is None:
            expected.add(uid)
        else:
            best[value] = min(best.get(value, (0, "~")), (-width, uid))
    assert set(selection.selected.column("uid").to_pylist()) == expected | {uid for _, uid in best.values()}
    dropped = Counter(selection.dropped.column("reason").to_pylist())
    assert dropped == Counter({"duplicate_sha256": len(rows) - len(selection.selected)} if len(dropped) else {})


@given(rows=table_rows, part=st.integers(1, 24), held_out=st.floats(0, 1), salt=st.text(max_size=4))
@settings(max_examples=60, deadline=None)
def test_split_is_stable_and_whole_by_group(rows: list[Any], part: int, held_out: float, salt: str) -> None:
    table = table_of(rows)
    split = {"by": "group", "held_out": held_out, "salt": salt}
    sides = split_sides(table, **split).to_pylist()
    assert split_sides(table.slice(0, part), **split).to_pylist() == sides[:part]
    sides_of_group: dict[str, set[str]] = {}
    for (group, *_), side in zip(rows, sides, strict=True):
        if group is not None:
            sides_of_group.setdefault(group, set()).add(side)
    assert all(len(found) == 1 for found in sides_of_group.values())


def test_share_of_held_out_groups_is_as_asked() -> None:
    table = rows_of(group=[f"name {i // 2}" for i in range(8000)])
    fractions = {}
    for salt in ("split", "other"):
        held_out = np.array(split_sides(table, by="group", held_out=0.1, salt=salt).to_pylist()) == "held_out"
        assert held_out.mean() == pytest.approx(0.1, abs=4 * (0.1 * 0.9 / 4000) ** 0.5)
        fractions[salt] = held_out
    assert (fractions["split"] != fractions["other"]).any()
    nested = np.array(split_sides(table, by="group", held_out=0.2, salt="split").to_pylist()) == "held_out"
    assert (nested | ~fractions["split"]).all()  # a larger share holds out what a smaller one does


def test_known_places_stay_where_they_are() -> None:
    """A changed hash would move samples from one side to the other in every user's dataset."""
    table = rows_of(group=["flag of France", "red heart", "grinning face", None], uid=["00", "01", "02", "03"])
    places = {h / 100: split_sides(table, by="group", held_out=h / 100, salt="split").to_pylist() for h in range(101)}
    thresholds = [next(h for h, sides in places.items() if sides[i] == "held_out") for i in range(4)]
    assert thresholds == [0.54, 0.74, 0.46, 0.31]
