"""Which shards a source is cut into, under which keys their units are, and which of them are to be made.

A shard's key is made of its rows and the settings that affect it: not of its place, nor of what is before or after it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.acquire.earlier import EarlierRows, Hashes, earlier_units, find_rows, uid_hashes
from pipelines.acquire.errors import SourceError
from pipelines.acquire.plan import shards
from pipelines.acquire.retry import asked_rows
from pipelines.acquire.reuse import FAILED
from pipelines.acquire.tables import rows_digest
from pipelines.artifacts import Unit
from pipelines.building import Build
from pipelines.recipe import Source

NAME_DIGITS = 16
LOOK_UP_THREADS, LOOK_UP_BATCH = 8, 64
"""Units are looked up so many at a time: in an object store each takes a while."""


@dataclass(frozen=True)
class Planned:
    """A shard to be. `twin` is the place of an earlier shard with the very same rows, if there is one."""

    index: int
    name: str
    unit_key: str
    rows: str
    """Digest of the shard's rows."""
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
    _first: dict[str, int] = field(default_factory=dict)

    def add(self, cut: _Cut, unit_key: str, unit: Unit | None) -> None:
        """The next shard, and its unit if that is there."""
        index = len(self.entries)
        first = self._first.setdefault(cut.rows, index)
        twin = first if first != index else None
        self.entries.append(Planned(index, cut.base_key[:NAME_DIGITS], unit_key, cut.rows, len(cut.uids), twin))
        if unit is not None:
            self.units[index] = unit

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
    layout, wanted = Layout(), []
    there = set(build.store.listdir(f"{build.stage}/units"))

    def find(unit_key: str) -> Unit | None:
        return build.find_unit(unit_key) if unit_key in there else None

    cuts = _cuts(source, shard_size, content, build)
    with ThreadPoolExecutor(LOOK_UP_THREADS) as pool:
        while batch := list(itertools.islice(cuts, LOOK_UP_BATCH)):
            keys = [build.current(cut.base_key) for cut in batch]
            for cut, current, known in zip(batch, keys, pool.map(find, keys), strict=True):
                unit_key, unit, asked = current, known, _asked(build, known)
                if asked:
                    layout.asked += asked
                    unit_key = build.renew(cut.base_key)
                    unit = find(unit_key)
                layout.add(cut, unit_key, unit)
                if unit is None:
                    wanted.append(uid_hashes(cut.uids.to_pylist()))
    if wanted:
        layout.wanted = np.unique(np.concatenate(wanted))
    return layout


@dataclass(frozen=True)
class _Cut:
    """A shard as it is cut from the source. `rows` is their digest, `uids` a column."""

    base_key: str
    rows: str
    uids: Any


def _cuts(source: Source, shard_size: int, content: Mapping[str, Any], build: Build) -> Iterator[_Cut]:
    times: Counter[str] = Counter()
    for rows in shards(source, shard_size):
        known = rows_digest(rows)
        times[known] += 1
        again = {"occurrence": times[known]} if times[known] > 1 else {}
        yield _Cut(build.base_key({**content, "rows": known, **again}), known, rows.column("uid"))


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
