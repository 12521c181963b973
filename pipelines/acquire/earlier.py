"""Where rows were before: in which published ledger of the store, and at which place of it.

The driver reads of earlier ledgers the columns by which rows are found and compared, and keeps those of the rows that
are to be made now. What became of a row, and whether that still holds, is looked up by the worker that makes its shard.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infra.storage import Store
from pipelines.acquire.record import STAGE, fits
from pipelines.artifacts import Unit
from pipelines.dataset.earlier import KnownUnits
from pipelines.dataset.ledger import Outcome, Reason
from pipelines.dataset.ledgers import LEDGER
from pipelines.dataset.uid import KEY_DIGITS, sample_key

READ_THREADS = 8
MAX_CANDIDATES = 8
"""Earlier rows of one uid that are looked at: the first nearly always decides."""
HASH_DIGITS = 16
COLUMNS = ("key", "outcome", "reason", "fetched_at")

Hashes = NDArray[np.uint64]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """Candidates for the rows of one shard, each row's in the order in which they are to be asked.

    `row` is the place in the shard, `unit` the place in `units`, `place` the place in that unit's ledger.
    """

    units: tuple[Unit, ...]
    row: NDArray[np.int32]
    unit: NDArray[np.int32]
    place: NDArray[np.int32]


@dataclass(frozen=True)
class EarlierRows:
    """Earlier rows, sorted by the hash of their uid, then by preference: `unit` is the place in `units`."""

    units: tuple[Unit, ...]
    hashes: Hashes
    unit: NDArray[np.int32]
    place: NDArray[np.int32]

    def of(self, hashes: Hashes) -> Places | None:
        """Candidates for rows with these hashes; None if there are none."""
        first = np.searchsorted(self.hashes, hashes, "left")
        counts = np.minimum(np.searchsorted(self.hashes, hashes, "right") - first, MAX_CANDIDATES)
        total = int(counts.sum())
        if not total:
            return None
        row = np.repeat(np.arange(len(hashes), dtype=np.int32), counts)
        within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        found = np.repeat(first, counts) + within
        used, unit = np.unique(self.unit[found], return_inverse=True)
        units = tuple(self.units[number] for number in used)
        return Places(units, row, unit.astype(np.int32), self.place[found])


def uid_hashes(uids: Sequence[str]) -> Hashes:
    """64 bits of each uid's sample key."""
    return _hashes([sample_key(uid) for uid in uids])


def all_of(unit: Unit) -> Places:
    """Each row at its own place: of a unit whose rows are the very same."""
    places = np.arange(unit.counts.total, dtype=np.int32)
    return Places((unit,), places, np.zeros_like(places), places)


def earlier_units(store: Store, made_with: Mapping[str, Any]) -> list[Unit]:
    """The units in the store whose rows can be taken over by units that are made with `made_with`, by key.

    Those of every source: one that is renamed, or gets others beside it, asks for nothing again. Raises `StorageError`
    if the store doesn't answer.
    """
    nodes = [name for name in store.listdir("") if name.partition(".")[0] == STAGE]
    fitting = [unit for node in nodes for unit in KnownUnits(store, node).all if fits(unit, made_with)]
    return sorted(fitting, key=lambda unit: unit.key)


def find_rows(store: Store, units: Sequence[Unit], wanted: Hashes) -> EarlierRows:
    """The rows of `units` whose uids have a hash in `wanted` (sorted), and of which something was learned.

    In order of preference: kept rows and those that opted out, the newest first, so that an opt-out isn't undone by a
    copy from before; then the others, the newest first. A ledger that is gone or damaged is passed over.
    """
    with ThreadPoolExecutor(READ_THREADS) as pool:
        tables = list(pool.map(lambda unit: _rows_of(store, unit, wanted), units))
    hashes, place, decided, fetched_at = (np.concatenate(column) for column in zip(*tables, strict=True))
    unit = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table[0]) for table in tables])
    order = np.lexsort((unit, -fetched_at, ~decided, hashes))
    return EarlierRows(tuple(units), hashes[order], unit[order], place[order])


def ledger_table(store: Store, unit: Unit, columns: Sequence[str] | frozenset[str]) -> Any | None:
    """The columns of the unit's ledger that are among `columns`; None if that is gone, or is not what was published.

    Raises `StorageError` if the store doesn't answer.
    """
    (entry,) = (entry for entry in unit.files if entry.name.endswith(LEDGER))
    try:
        data = store.read_bytes(unit.path(entry.name))
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        logger.warning("the ledger of unit %s is gone or damaged, and passed over", unit.key)
        return None
    file = pq.ParquetFile(io.BytesIO(data), pre_buffer=False)
    return file.read([name for name in file.schema_arrow.names if name in columns], use_threads=False)


def _rows_of(
    store: Store, unit: Unit, wanted: Hashes
) -> tuple[Hashes, NDArray[np.int32], NDArray[np.bool_], NDArray[np.int64]]:
    """Hash, place, whether kept or opted out, and time in ms of the unit's rows that are wanted."""
    table = ledger_table(store, unit, COLUMNS)
    if table is None:
        return np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0, bool), np.empty(0, np.int64)
    hashes = _hashes(table.column("key").to_pylist())
    kept = np.array([outcome == Outcome.KEPT for outcome in table.column("outcome").to_pylist()], bool)
    opted = np.array([reason == Reason.OPT_OUT for reason in table.column("reason").to_pylist()], bool)
    times = table.column("fetched_at").cast(pa.int64())
    asked = times.is_valid().to_numpy(zero_copy_only=False)
    ms = times.fill_null(0).to_numpy()
    at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
    places = np.flatnonzero((wanted[at] == hashes) & asked)
    return hashes[places], places.astype(np.int32), (kept | opted)[places], ms[places]


def _hashes(keys: Sequence[str]) -> Hashes:
    """The first 64 bits of hexadecimal keys."""
    digits = np.frombuffer(np.array(keys, f"S{KEY_DIGITS}").tobytes(), np.uint8).reshape(len(keys), KEY_DIGITS)
    digits = digits[:, :HASH_DIGITS]
    nibbles = np.where(digits > ord("9"), digits - ord("a") + 10, digits - ord("0")).astype(np.uint8)
    packed = np.ascontiguousarray(nibbles[:, 0::2] << 4 | nibbles[:, 1::2])
    return packed.view(">u8").reshape(len(keys)).astype(np.uint64)
