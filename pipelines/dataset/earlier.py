"""Rows that earlier units of a node hold already: found by what they were computed from, copied instead of computed.

A unit that rows can be copied from has `inputs.npy`, for each of its rows 16 bytes of a hash of what the row was
computed from, and says in `made_with` what with. Earlier units are those that any revision of the node lists, and those
that lie in the store besides. Which rows of which unit are to be copied is found once, in the driver, which holds
hashes and places alone; values are read where they are used.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infra.digests import check
from infra.storage import FileDamaged, StorageError, Store
from pipelines.again import Again
from pipelines.artifacts import UNITS_TABLE, ArtifactError, Unit, fetch_file, find_unit, load
from pipelines.dataset.ahead import ahead
from pipelines.dataset.errors import DatasetError

INPUTS = "inputs.npy"
INPUT_BYTES = 16
FEW = 256
"""A unit is not read for less than one in so many of its rows: computing them takes no longer."""
UNREADABLE = (OSError, ValueError, StorageError, ArtifactError, DatasetError, pa.ArrowException)
"""What a file that is missing or damaged is met with."""

Inputs = NDArray[np.bytes_]
"""[rows] of type S16; empty where it isn't known what a row was computed from."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Copied:
    """Rows `there` of an earlier unit are rows `here` of one to be made."""

    unit: Unit
    there: NDArray[np.int64]
    here: NDArray[np.int64]


def inputs_of(*columns: Sequence[str | None]) -> Inputs:
    """A hash of each row's values. The first column must be known: where it is null or empty, nothing is."""
    return np.array([_input(row) if row[0] else b"" for row in zip(*columns, strict=True)], f"S{INPUT_BYTES}")


def inputs_bytes(inputs: Inputs) -> bytes:
    """`inputs.npy`."""
    sink = io.BytesIO()
    np.save(sink, inputs, allow_pickle=False)
    return sink.getvalue()


class KnownUnits:
    """The units of a node that were made with one of `made_with`, or with anything. Takes two requests for each of its
    revisions, and one for each unit that no revision lists: those of runs that were interrupted, or refused in the end.

    `again` is what of the node is to be made again. Raises `StorageError` if the store doesn't answer: nothing is
    asked for or computed twice because of that.
    """

    def __init__(
        self, store: Store, stage: str, made_with: Collection[str] | None = None, again: Again | None = None
    ) -> None:
        self._store = store
        self._stage = stage
        self._made_with = made_with
        self._again = again

    @cached_property
    def listed(self) -> dict[str, Unit]:
        """Units that a revision lists, by key."""
        found: dict[str, Unit] = {}
        for records in ahead(self._read_list, self._store.listdir(f"{self._stage}/revisions")):
            found |= {key: Unit.from_json(json.loads(record)) for key, record in records if key not in found}
        return found

    @cached_property
    def _there(self) -> frozenset[str]:
        return frozenset(self._store.listdir(f"{self._stage}/units"))

    def find(self, unit_key: str) -> Unit | None:
        """The published unit, if there is one. Where some are to be made again, each one's own record is looked at."""
        if unit_key not in self._there:
            return None
        listed = self.listed.get(unit_key) if self._again is None else None
        return listed or find_unit(self._store, self._stage, unit_key)

    def earlier(self, made_with: str, but: Collection[str]) -> list[Unit]:
        """Units that were made with this, the largest first, without those whose keys are in `but`: what is used where
        it lies needs no copy. None where all is to be made from nothing."""
        if self._again is not None and self._again.why == "force":
            return []
        fitting = [unit for unit in self.all if unit.info.get("made_with") == made_with and unit.key not in but]
        return sorted(fitting, key=lambda unit: (-unit.counts.total, unit.key))

    @cached_property
    def all(self) -> list[Unit]:
        """Units that a revision lists and that are still there, and those that none lists, of anything."""
        besides = sorted(self._there - set(self.listed))
        found = ahead(lambda key: find_unit(self._store, self._stage, key), besides)
        return [*(unit for key, unit in self.listed.items() if key in self._there), *(u for u in found if u)]

    def _read_list(self, revision: str) -> Iterator[tuple[str, str]]:
        """Keys and records of the units of a revision. Most of an old one may have been made with something else: their
        records are passed over as text."""
        try:
            listed = load(self._store, self._stage, revision)
            data = self._store.read_bytes(f"{listed.path}/{UNITS_TABLE}")
            if hashlib.sha256(data).hexdigest() != listed.manifest["tables"][UNITS_TABLE]:
                raise FileDamaged(f"{UNITS_TABLE} is not what was written")
            table = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(["key", "record"], use_threads=False)
        except UNREADABLE as error:
            logger.info("units of %s, revision %s, are not looked at: %s", self._stage, revision, error)
            return iter(())
        if self._made_with is not None:
            ours = np.zeros(len(table), bool)
            for made_with in self._made_with:
                ours |= pc.match_substring(table.column("record"), made_with).to_numpy()
            table = table.filter(pa.array(ours))
        return zip(table.column("key").to_pylist(), table.column("record").to_pylist(), strict=True)


def copied_rows(store: Store, wanted: Sequence[Inputs], units: Iterable[Unit]) -> list[list[Copied]]:
    """Where the rows of some units to be made are found among `units`, for each of `wanted`; the rest is nowhere, or
    not worth the reading."""
    every, place = np.unique(np.concatenate([np.zeros(0, f"S{INPUT_BYTES}"), *wanted]), return_inverse=True)
    source_of, row_of = np.full(len(every), -1, np.int64), np.zeros(len(every), np.int64)
    open_ = every != b""
    sources: list[Unit] = []
    for unit, inputs in ahead(lambda unit: (unit, _read_inputs(store, unit)), units if open_.any() else ()):
        at = np.minimum(np.searchsorted(every, inputs), len(every) - 1)
        found = np.flatnonzero((every[at] == inputs) & open_[at])
        source_of[at[found]], row_of[at[found]] = len(sources), found
        open_[at[found]] = False
        sources.append(unit)
        if not open_.any():
            break
    ends = np.cumsum([len(inputs) for inputs in wanted])
    return [_copied(part, source_of, row_of, sources) for part in np.split(place, ends[:-1])] if len(ends) else []


def recorded_file(store: Store, unit: Unit, name: str) -> Path:
    """A file of the unit on this machine, with the bytes that were recorded of it.

    Raises one of `UNREADABLE` if it is missing or has others.
    """
    local = fetch_file(store, unit, name)
    if store.is_local:
        entry = unit.entry(name)
        check(local, store.location(unit.path(name)), entry.size_bytes, entry.sha256)
    return local


def _input(values: Iterable[str | None]) -> bytes:
    hasher = hashlib.sha256()
    for value in values:
        encoded = (value or "").encode("utf-8", "surrogatepass")
        hasher.update(len(encoded).to_bytes(8, "big"))
        hasher.update(encoded)
    return hasher.digest()[:INPUT_BYTES]


def _read_inputs(store: Store, unit: Unit) -> Inputs:
    """None at all if the file is missing or damaged."""
    try:
        inputs = np.load(recorded_file(store, unit, INPUTS), allow_pickle=False)
    except UNREADABLE as error:
        logger.info("no rows of unit %s are copied: %s", unit.key, error)
        return np.zeros(0, f"S{INPUT_BYTES}")
    return np.asarray(inputs, f"S{INPUT_BYTES}")


def _copied(
    places: NDArray[np.int64], source_of: NDArray[np.int64], row_of: NDArray[np.int64], sources: Sequence[Unit]
) -> list[Copied]:
    own = source_of[places]
    found = []
    for source in np.unique(own[own >= 0]).tolist():
        here = np.flatnonzero(own == source)
        if len(here) * FEW >= sources[source].counts.total:
            found.append(Copied(sources[source], row_of[places[here]], here))
    return found
