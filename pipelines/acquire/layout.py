"""Which shards a source is cut into, under which keys their units are, and which of them are to be made.

A shard's key is made of its rows and the settings that affect it: not of its place, nor of what is before or after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.acquire.earlier import EarlierRows, Hashes, earlier_units, find_rows, uid_hashes
from pipelines.acquire.errors import SourceError
from pipelines.acquire.plan import rows_digest, shards
from pipelines.acquire.retry import asked_rows
from pipelines.acquire.reuse import FAILED
from pipelines.artifacts import Unit
from pipelines.building import Build
from pipelines.recipe import Source

NAME_DIGITS = 16


@dataclass(frozen=True)
class Planned:
    """A shard to be. `twin` is the place of an earlier shard with the very same rows, if there is one."""

    index: int
    name: str
    unit_key: str
    rows: str
    """Their digest."""
    num_rows: int
    twin: int | None = None


@dataclass
class Layout:
    """All shards of a source, in its order, and the units that are there by their places."""

    entries: list[Planned] = field(default_factory=list)
    units: dict[int, Unit] = field(default_factory=dict)
    wanted: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))
    """Hashes of the uids of shards that are to be made, sorted."""
    asked: int = 0
    """Rows that are asked for again."""

    @property
    def num_rows(self) -> int:
        return sum(entry.num_rows for entry in self.entries)

    @property
    def missing(self) -> dict[int, Planned]:
        return {entry.index: entry for entry in self.entries if entry.index not in self.units}

    @property
    def ordered(self) -> list[Unit]:
        return [self.units[entry.index] for entry in self.entries]


def lay_out(source: Source, shard_size: int, content: Mapping[str, Any], build: Build) -> Layout:
    """Reads the source once to know each shard by its content; keeps no rows. Raises `SourceError`.

    `content` are the settings that units are made with. A unit with rows that are asked for again is to be made anew.
    """
    layout = Layout()
    first: dict[str, int] = {}
    times: dict[str, int] = {}
    wanted = []
    for index, rows in enumerate(shards(source, shard_size)):
        known = rows_digest(rows)
        times[known] = times.get(known, 0) + 1
        again = {"occurrence": times[known]} if times[known] > 1 else {}
        base_key = build.base_key({**content, "rows": known, **again})
        unit_key = build.current(base_key)
        unit = build.find_unit(unit_key)
        asked = _asked(build, unit)
        if asked:
            layout.asked += asked
            unit_key = build.renew(base_key)
            unit = build.find_unit(unit_key)
        twin = first.setdefault(known, index)
        name = base_key[:NAME_DIGITS]
        layout.entries.append(Planned(index, name, unit_key, known, rows.num_rows, twin if twin != index else None))
        if unit is not None:
            layout.units[index] = unit
        else:
            wanted.append(uid_hashes(rows.column("uid").to_pylist()))
    if wanted:
        layout.wanted = np.unique(np.concatenate(wanted))
    return layout


def earlier_rows(layout: Layout, made_with: Mapping[str, Any], build: Build) -> EarlierRows | None:
    """Where the rows that are to be made were before; None if they were nowhere, or are to be made from nothing."""
    if not len(layout.wanted) or (build.again is not None and build.again.why == "force"):
        return None
    units = earlier_units(build.store, made_with)
    return find_rows(build.store, units, layout.wanted) if units else None


def reasons_asked(build: Build) -> tuple[str, ...]:
    """Reasons by which rows are asked for again: all that failed, if none were given."""
    if build.again is None or build.again.why != "retry":
        return ()
    return build.again.reasons or (FAILED,)


def rows_of(source: Source, shard_size: int, missing: Mapping[int, Planned]) -> Iterator[tuple[Planned, Any]]:
    """The source again, for the rows of the missing shards. Raises `SourceError` if they aren't what was planned."""
    for index, rows in enumerate(shards(source, shard_size)):
        if index not in missing:
            continue
        if rows_digest(rows) != missing[index].rows:
            raise SourceError("the source has changed since this run began: run the same command again to take it anew")
        yield missing[index], rows


def _asked(build: Build, unit: Unit | None) -> int:
    reasons = reasons_asked(build)
    return asked_rows(unit, reasons) if unit is not None and reasons else 0
