"""The columns that a pair has when it is selected, as the recipe alone tells: of its ledger, and of its scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipelines.dataset.ledger import OPTIONAL_SOURCE_COLUMNS, SOURCE_COLUMNS, ledger_schema
from pipelines.dataset.ledgers import SHARD, SOURCE
from pipelines.recipe import NamedSource, ScoreSpec
from pipelines.recipe.scorers import SCORERS, ScorerKind, columns_by_name
from pipelines.recipe.sources import UNKNOWN

EMPTY_WHEN_KEPT = {"reason", "error_class", "error_message", "opt_out"}
"""Columns of a ledger that say why a row was not kept."""


@dataclass(frozen=True)
class Columns:
    """Arrow types by name, `UNKNOWN` where the recipe doesn't tell. `empty`: those without a value in any kept row,
    with what would fill them. `lacking`: those without a value in any row of some of several sources, with these
    sources' places in the recipe."""

    types: Mapping[str, Any]
    empty: Mapping[str, str]
    lacking: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __contains__(self, name: object) -> bool:
        return name in self.types

    def has_values(self, name: str) -> bool:
        """Whether there is such a column, and some row may have a value in it."""
        return name in self.types and name not in self.empty


def ledger_columns(sources: Sequence[NamedSource]) -> Columns:
    """Columns of the ledgers that `acquire` makes of these sources, read as one."""
    found = {source.where: _ledger_columns(source) for source in sources}
    if all(not source.name for source in sources):
        return next(iter(found.values()), Columns({}, {}))
    names = dict.fromkeys(name for columns in found.values() for name in columns.types)
    without = {
        name: {where: columns.empty.get(name, "") for where, columns in found.items() if not columns.has_values(name)}
        for name in names
    }
    return Columns(
        {name: _common([columns.types[name] for columns in found.values() if name in columns]) for name in names}
        | {SOURCE.name: SOURCE.type},
        {name: _why(places.values()) for name, places in without.items() if len(places) == len(found)},
        {name: tuple(places) for name, places in without.items() if 0 < len(places) < len(found)},
    )


def pair_columns(sources: Sequence[NamedSource], score: ScoreSpec | None) -> Columns:
    """Columns of ledgers and scores: what `select` looks at."""
    ledger = ledger_columns(sources)
    scores = score_columns(score)
    empty = {name: why for name, why in ledger.empty.items() if name not in scores}
    lacking = {name: places for name, places in ledger.lacking.items() if name not in scores}
    return Columns({**ledger.types, **scores}, empty, lacking)


def _ledger_columns(source: NamedSource) -> Columns:
    own = source.block.columns()
    schema = ledger_schema(pa.schema([*SOURCE_COLUMNS, *own]))
    types = dict(zip(schema.names, schema.types, strict=True)) | {SHARD.name: SHARD.type}
    empty = dict.fromkeys(EMPTY_WHEN_KEPT & types.keys(), "no kept pair has a value there")
    given = {field.name for field in own}
    unsaid = [field.name for field in OPTIONAL_SOURCE_COLUMNS if field.name not in given]
    return Columns(types, empty | {name: source.block.fill(source.where, name) for name in unsaid})


def _common(types: Sequence[Any]) -> Any:
    """The type of a column that several sources have; `UNKNOWN` if it isn't the same for all."""
    return types[0] if all(kind == types[0] for kind in types) else UNKNOWN


def _why(reasons: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, reasons)))


def score_columns(score: ScoreSpec | None) -> dict[str, Any]:
    """Arrow types of the columns of scores, by name. They hide a ledger's of their name."""
    kinds = [] if score is None else asked_scorers(score)
    return {column.name: column.type for kind in kinds for column in kind.columns}


def asked_scorers(score: ScoreSpec) -> list[ScorerKind]:
    """The scorers that a recipe asks for: the built-in ones that are switched on, then those of `score.scorers` by
    name, as far as they are registered."""
    built_in = [kind for kind in SCORERS.values() if kind.key and getattr(score, kind.key)]
    return built_in + [SCORERS[name] for name in sorted(score.scorers) if name in SCORERS and not SCORERS[name].key]


def scored_by(column: str) -> str | None:
    """The key of a recipe that asks for a column of scores; None if no scorer gives it."""
    known = columns_by_name().get(column)
    return None if known is None else known[0].where


def range_of(column: str) -> tuple[float, float] | None:
    """Least and greatest value of a column of scores; None if it has neither."""
    known = columns_by_name().get(column)
    if known is None or (known[1].least is None and known[1].greatest is None):
        return None
    least, greatest = known[1].least, known[1].greatest
    return -math.inf if least is None else least, math.inf if greatest is None else greatest
