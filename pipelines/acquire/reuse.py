"""Rows taken over from earlier ledgers, where what became of them is still true under today's rules.

An earlier row holds for a new one if it is the same pair: uid, normalised URL and caption, and, where the source tells
it, as a folder does, the hash of what lies there. It is then judged as its answer would be judged today. Images come
out of the earlier tar, and are compared with the hash that the ledger has of them; a row whose image isn't there, or
isn't what it was, is asked for anew.
"""

from __future__ import annotations

import hashlib
import logging
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pyarrow as pa

from infra.storage import FileDamaged, Store
from pipelines.acquire.earlier import Places, ledger_table
from pipelines.acquire.filter import judge_known, too_many_bytes_message
from pipelines.acquire.record import limits_of, manners_known
from pipelines.acquire.rows import Row, as_it_was, dropped_now
from pipelines.artifacts import Unit
from pipelines.dataset.ledger import RESULT_COLUMNS, UNASKED, ErrorClass, Outcome, Reason
from pipelines.dataset.ledgers import TAR
from pipelines.dataset.uid import normalised_caption, normalised_url
from pipelines.recipe import AcquireSpec
from pipelines.recipe.sources import FILE_HASH

FAILED, TRANSIENT = "failed", "transient"
"""What a row may be asked for again by, besides its reason."""
UNREADABLE = (OSError, FileDamaged, tarfile.TarError, ValueError)
"""What a tar that is gone or damaged raises (FileNotFoundError is an OSError); not a store that doesn't answer."""

READ_COLUMNS = frozenset({"url", "caption", "uid", "key", FILE_HASH, *RESULT_COLUMNS})

Add = Callable[[int, Row, bytes | None], None]

logger = logging.getLogger(__name__)


@dataclass
class Taken:
    """Places of the rows that were taken over, and the manners that their ledgers name, by id."""

    places: set[int] = field(default_factory=set)
    manners: dict[str, Mapping[str, Any]] = field(default_factory=dict)


class _Verdict(Enum):
    """What an earlier row says of a new one."""

    HOLDS = "what became of it is what would become of it today"
    IMAGE = "the same, and its image is in the tar"
    OTHER = "it is another pair, or nothing was asked for it"
    STALE = "it was dropped by a rule that doesn't stand today"
    ASKED = "it is asked for again"


@dataclass
class _Open:
    """A row that is looked for. `candidates` are (place in `Places.units`, place in its ledger)."""

    candidates: deque[tuple[int, int]]
    only_image: bool = False
    """A newer row knows better, but can't give it: of older ones, what they know counts no more, but their images."""


def asked_for(row: Mapping[str, Any], asked: Sequence[str]) -> bool:
    """Whether a ledger's row is among those that are asked for again: by its reason, or as failed or transient."""
    return (
        row["reason"] in asked
        or (FAILED in asked and row["outcome"] == Outcome.FAILED)
        or (TRANSIENT in asked and row["error_class"] == ErrorClass.TRANSIENT)
    )


def take_over(
    earlier: Places,
    rows: Sequence[Row],
    waiting: Iterable[int],
    spec: AcquireSpec,
    store: Store,
    asked: Sequence[str],
    add: Add,
) -> Taken:
    """Give to `add` those of the rows `waiting` that were made before: place, what became of them, image if kept.

    Candidates are looked at in rounds, so that each earlier ledger and tar is mostly read once. Nothing that is wrong
    with what was published earlier is an error.
    """
    taken = Taken()
    open_rows = _opened(earlier, waiting)
    while open_rows:
        for number, pairs in _next_candidates(open_rows):
            unit = earlier.units[number]
            taken.manners.update(manners_known(unit))
            with_image = []
            for row, old in zip((row for row, _ in pairs), _read(unit, store, pairs), strict=True):
                if old is None:
                    open_rows[row].only_image = True
                    continue
                verdict, result = _judged(old, rows[row], unit, spec, asked)
                if verdict is _Verdict.IMAGE:
                    with_image.append((row, old))
                if verdict in {_Verdict.IMAGE, _Verdict.STALE}:
                    open_rows[row].only_image = True
                elif verdict is _Verdict.HOLDS and not open_rows[row].only_image:
                    add(row, result, None)
                    taken.places.add(row)
                if verdict in {_Verdict.HOLDS, _Verdict.ASKED}:
                    del open_rows[row]
            for row, old, image in _images(unit, store, with_image, spec.image.encode_format):
                add(row, as_it_was(old), image)
                taken.places.add(row)
                del open_rows[row]
    return taken


def _opened(earlier: Places, waiting: Iterable[int]) -> dict[int, _Open]:
    wanted = set(waiting)
    found: dict[int, _Open] = {}
    for row, unit, place in zip(earlier.row.tolist(), earlier.unit.tolist(), earlier.place.tolist(), strict=True):
        if row in wanted:
            found.setdefault(row, _Open(deque())).candidates.append((unit, place))
    return found


def _next_candidates(open_rows: dict[int, _Open]) -> list[tuple[int, list[tuple[int, int]]]]:
    """By unit, the next candidate of each row, as (row, place in the ledger); rows without one are open no more."""
    by_unit: dict[int, list[tuple[int, int]]] = {}
    for row, state in list(open_rows.items()):
        if state.candidates:
            unit, place = state.candidates.popleft()
            by_unit.setdefault(unit, []).append((row, place))
        else:
            del open_rows[row]
    return sorted(by_unit.items())


def _judged(
    old: Mapping[str, Any], new: Mapping[str, Any], unit: Unit, spec: AcquireSpec, asked: Sequence[str]
) -> tuple[_Verdict, Row]:
    """What `old`, of `unit`, says of `new`; with `RESULT_COLUMNS` where that holds."""
    if not _is_same_pair(old, new) or old["reason"] in UNASKED:
        return _Verdict.OTHER, {}
    if asked_for(old, asked):
        return _Verdict.ASKED, {}
    result = _today(old, unit, spec)
    if result is not None:
        return _Verdict.HOLDS, result
    return (_Verdict.IMAGE if old["outcome"] == Outcome.KEPT else _Verdict.STALE), {}


def _today(old: Mapping[str, Any], unit: Unit, spec: AcquireSpec) -> Row | None:
    """`RESULT_COLUMNS` of what would become of the row today; None if it would be kept, or nobody knows."""
    known = judge_known(old, spec)
    if known is not None:
        return dropped_now(old, *known)
    limits, reason = limits_of(unit), old["reason"]
    if reason in {None, Reason.OPT_OUT, Reason.TOO_SMALL, Reason.TOO_ELONGATED}:
        return None
    if reason == Reason.TOO_MANY_BYTES:
        message = too_many_bytes_message(spec.fetch.max_bytes)
        return dropped_now(old, reason, message) if spec.fetch.max_bytes <= limits["max_bytes"] else None
    if reason == Reason.TOO_MANY_PIXELS:
        unmeasured = old["original_width"] is None
        return as_it_was(old) if unmeasured and spec.fetch.max_pixels <= limits["max_pixels"] else None
    return as_it_was(old)


def _is_same_pair(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """A file that couldn't be read has no hash, and is looked at again."""
    return (
        old["uid"] == new["uid"]
        and normalised_url(old["url"] or "") == normalised_url(new["url"] or "")
        and normalised_caption(old["caption"] or "") == normalised_caption(new["caption"] or "")
        and (FILE_HASH not in new or new[FILE_HASH] is not None)
        and old.get(FILE_HASH) == new.get(FILE_HASH)
    )


# -- reading -----------------------------------------------------------------------------------------------------------


def _read(unit: Unit, store: Store, pairs: Sequence[tuple[int, int]]) -> list[Row] | list[None]:
    """The rows of the unit's ledger at each pair's second; None for all if that isn't what was published."""
    table = ledger_table(store, unit, READ_COLUMNS)
    if table is None:
        return [None] * len(pairs)
    rows: list[Row] = table.take(pa.array([place for _, place in pairs], pa.int64())).to_pylist()
    return rows


def _images(unit: Unit, store: Store, rows: Sequence[tuple[int, Row]], suffix: str) -> Iterator[tuple[int, Row, bytes]]:
    """The stored images of the rows, as far as they are there and what their ledger says."""
    if not rows:
        return
    wanted = {f"{old['key']}.{suffix}": (row, old) for row, old in rows}
    (entry,) = (entry for entry in unit.files if entry.name.endswith(TAR))
    try:
        with tarfile.open(store.fetch(unit.path(entry.name), entry.size_bytes), "r:") as tar:
            for member in tar:
                if member.name not in wanted or member.size > entry.size_bytes:
                    continue
                row, old = wanted.pop(member.name)
                file = tar.extractfile(member)
                image = file.read() if file is not None else b""
                if hashlib.sha256(image).hexdigest() == old["stored_sha256"]:
                    yield row, old, image
                else:
                    logger.warning("%s of unit %s is damaged: its row is made anew", member.name, unit.key)
    except UNREADABLE as error:
        logger.warning("the tar of unit %s is passed over from here on: %s", unit.key, error)
