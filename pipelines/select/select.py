"""Which rows of the ledgers stay, which go and why, and on which side of the split they are.

Pure functions over pyarrow tables: the result depends on the rows alone, not on their order or number. Predicates come
before duplicates, so that a row that is dropped anyway can't shadow a good one; of one uid a single row stays, whatever
the rules; equal images come before those that look alike, which cost more to find.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.dataset.ledger import Reason
from pipelines.dataset.selection import NEAR_DUPLICATE, ROW_COLUMNS, Side
from pipelines.dataset.split import split_sides, without_nan
from pipelines.recipe import NearDuplicates, SelectSpec
from pipelines.recipe.errors import UnusableRule
from pipelines.recipe.predicates import check_predicate, kind_of_type, require_columns
from pipelines.select.errors import NothingSelected
from pipelines.select.near_duplicates import near_duplicates
from pipelines.select.predicates import Mask, passes

AREA_COLUMNS = ("original_width", "original_height")
LOOK_COLUMNS = ("phash", "thumbnail")
STAYS = -1
REPEATED = Reason.REPEATED.value
"""Reason of rows whose uid another shard has too; within a shard, `acquire` drops them by the same name."""
PREFERENCE = (("area", "descending"), *((name, "ascending") for name in ROW_COLUMNS))
"""Order of rows of which one, the first, stays: the larger original, among equals the lower uid."""


@dataclass(frozen=True)
class Selection:
    """`selected` has uid, shard, key and split, `dropped` has uid, shard, key and reason; both by shard and key.

    `rows` are those that were chosen among, in that order too; `stays` is true for those that are selected.
    """

    selected: Any
    dropped: Any
    rows: Any
    stays: Mask
    near_duplicates: Any = None
    """uid, shard and key of each near-duplicate and (`winner_...`) of the row that stays for it, with `bits` and `rms`,
    by which they differ. None if the rules say nothing of them."""

    def side(self, side: Side) -> int:
        """Number of rows on that side of the split."""
        return int(pc.sum(pc.equal(self.selected.column("split"), side)).as_py() or 0)

    @property
    def reasons(self) -> dict[str, int]:
        """Dropped rows by reason."""
        counted = pc.value_counts(self.dropped.column("reason"))
        return {entry["values"]: entry["counts"] for entry in sorted(counted.to_pylist(), key=lambda e: e["values"])}


def needed_columns(spec: SelectSpec) -> list[str]:
    """The columns that `choose` needs for these rules, each once; `shard` comes with the rows."""
    own = ["uid", "key", *AREA_COLUMNS, *(LOOK_COLUMNS if spec.near_duplicates is not None else ())]
    named = (column for _, column in _named_columns(spec) if column != "shard")
    return list(dict.fromkeys([*own, *named]))


def reason_names(spec: SelectSpec) -> list[str]:
    """Every reason that can appear, in the order in which the rules are applied."""
    near = (NEAR_DUPLICATE,) if spec.near_duplicates is not None else ()
    equal = (f"duplicate_{column}" for column in spec.duplicates)
    return [*(rule.name for rule in spec.where), REPEATED, *equal, *near]


def check_rules(spec: SelectSpec, types: Mapping[str, Any]) -> None:
    """Compare the rules with the columns that there are, by name and Arrow type, before any row is read.

    Raises:
        UnknownColumn: a rule names a column that isn't there; the message lists those that are.
        UnusableRule: a rule's value or operation doesn't fit the type of its column.
    """
    require_columns(_named_columns(spec), types)
    for predicate in spec.where:
        check_predicate(predicate, types[predicate.column])
    for where, column in (
        *(("select.duplicates", name) for name in spec.duplicates),
        ("select.split.by", spec.split.by),
    ):
        if kind_of_type(types[column]) == "other":
            raise UnusableRule(
                f"{where}: column {column!r} is of type {types[column]}; give one of text, numbers, true or false"
            )


def choose(rows: Any, spec: SelectSpec) -> Selection:
    """Apply the rules to a table with the columns of `needed_columns` and `shard`.

    Raises `NothingSelected` if no row is left for training.
    """
    rows = rows.sort_by([("shard", "ascending"), ("key", "ascending")])
    reason_of_row = np.full(rows.num_rows, STAYS, np.int16)
    for code, predicate in enumerate(spec.where):
        failed = ~passes(rows.column(predicate.column), predicate)
        reason_of_row[failed & (reason_of_row == STAYS)] = code
    for code, column in enumerate(("uid", *spec.duplicates), start=len(spec.where)):
        staying = np.flatnonzero(reason_of_row == STAYS)
        reason_of_row[staying[duplicates(rows.take(pa.array(staying)), column)]] = code
    pairs = None
    if spec.near_duplicates is not None:
        losers, pairs = _near_duplicates(rows, np.flatnonzero(reason_of_row == STAYS), spec.near_duplicates)
        reason_of_row[losers] = len(spec.where) + 1 + len(spec.duplicates)
    kept = reason_of_row == STAYS
    selected = rows.filter(pa.array(kept))
    dropped = rows.filter(pa.array(~kept)).select(ROW_COLUMNS)
    codes = pa.array(reason_of_row[~kept], pa.int16())
    reason = pa.DictionaryArray.from_arrays(codes, pa.array(reason_names(spec), pa.string())).cast(pa.string())
    sides = split_sides(selected, **spec.split.model_dump())
    result = Selection(
        selected.select(ROW_COLUMNS).append_column("split", sides),
        dropped.append_column("reason", reason),
        rows,
        kept,
        pairs,
    )
    if result.side("train") == 0:
        raise NothingSelected(_nothing_left(result, spec))
    return result


def duplicates(rows: Any, column: str) -> Mask:
    """True for each row whose value in `column` another row has that comes before it: the larger original, among
    equals the lower uid (then shard and key). Nulls are duplicates of nothing."""
    losers = np.zeros(rows.num_rows, bool)
    codes = _codes(rows.column(column))
    shared = np.flatnonzero((codes >= 0) & (np.bincount(codes + 1)[codes + 1] > 1))
    if not len(shared):
        return losers
    groups = _with_area(rows.take(pa.array(shared))).append_column("code", pa.array(codes[shared]))
    ranked = pc.sort_indices(groups, sort_keys=[("code", "ascending"), *PREFERENCE]).to_numpy()
    ranked_codes = codes[shared][ranked]
    losers[shared[ranked[1:][ranked_codes[1:] == ranked_codes[:-1]]]] = True
    return losers


def _near_duplicates(rows: Any, staying: NDArray[np.int64], rule: NearDuplicates) -> tuple[NDArray[np.int64], Any]:
    """Which of the rows `staying` go, and `Selection.near_duplicates`. A row without hash or thumbnail stays."""
    hashes, thumbnails = (rows.column(name) for name in LOOK_COLUMNS)
    known = pc.and_(pc.is_valid(hashes), pc.is_valid(thumbnails)).to_numpy()
    places = staying[known[staying]]
    looks = rows.take(pa.array(places))
    ranked = pc.sort_indices(_with_area(looks), sort_keys=list(PREFERENCE)).to_numpy()
    rank = np.empty(len(places), np.int64)
    rank[ranked] = np.arange(len(places))
    pixels = np.frombuffer(b"".join(looks.column("thumbnail").to_pylist()), np.uint8)
    found = near_duplicates(
        looks.column("phash").to_numpy().astype(np.uint64, copy=False),
        pixels.reshape(len(places), -1) if len(places) else np.zeros((0, 1), np.uint8),
        rank,
        max_bits=rule.max_bits,
        max_rms=rule.max_rms,
    )
    pairs = looks.select(ROW_COLUMNS).take(pa.array(found.losers))
    winners = looks.select(ROW_COLUMNS).take(pa.array(found.winners))
    for name in ROW_COLUMNS:
        pairs = pairs.append_column(f"winner_{name}", winners.column(name))
    pairs = pairs.append_column("bits", pa.array(found.bits)).append_column("rms", pa.array(found.rms))
    return places[found.losers], pairs


def _with_area(rows: Any) -> Any:
    """`ROW_COLUMNS` and `area`."""
    width, height = (pc.cast(pc.fill_null(rows.column(name), 0), pa.int64()) for name in AREA_COLUMNS)
    return rows.select(ROW_COLUMNS).append_column("area", pc.multiply(width, height))


def _codes(column: Any) -> NDArray[np.int64]:
    """Equal values as equal numbers from 0, null and NaN as -1."""
    encoded = without_nan(column).combine_chunks().dictionary_encode()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.combine_chunks()
    codes: NDArray[np.int64] = pc.fill_null(encoded.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
    return codes


def _named_columns(spec: SelectSpec) -> list[tuple[str, str]]:
    """(recipe key, column) of every column that the rules name."""
    return [
        *((f"select.where ({predicate.name})", predicate.column) for predicate in spec.where),
        *(("select.duplicates", column) for column in spec.duplicates),
        *(("select.near_duplicates", column) for column in (LOOK_COLUMNS if spec.near_duplicates else ())),
        ("select.split.by", spec.split.by),
    ]


def _nothing_left(result: Selection, spec: SelectSpec) -> str:
    total = result.selected.num_rows + result.dropped.num_rows
    funnel = ", ".join(f"{reason} {count:,}" for reason, count in result.reasons.items())
    if not total:
        return "no pair is left to train on: `acquire` kept none; see its ledgers for the reasons"
    if result.selected.num_rows:
        return (
            f"no pair is left to train on: of {total:,} pairs all {result.selected.num_rows:,} that are not dropped"
            f" are held out; lower select.split.held_out ({spec.split.held_out}), or split by a column with more than"
            f" a few different values than {spec.split.by!r}"
        )
    return f"no pair is left to train on: of {total:,} pairs all are dropped ({funnel}); loosen these rules of `select`"
