"""What nothing reaches, found and deleted.

While it lasts no build begins (`pipelines.building` waits at the lock `gc`), no other collection does, and of a node
that somebody is making everything stays. Kept is what `pipelines.workflow.reach` says, and all that is younger than a
day. Deleted is, of what is left: revisions and the answers that lead to them, units that only they list, and copies of
listed ones, folders of units without a record, checkpoints of trainings that are published, files that were never
finished; and, where it is asked for, work that was interrupted: units that no revision lists, with their checkpoints.

The order is such that a kill at any point leaves nothing that looks complete: answers, then manifests, then records of
units, then files. A revision's table of units goes last, so that the next collection knows what the killed one was at.

A run that starts meanwhile finds an answer, and then all of it is there; or it waits, and then makes what is gone. Its
plan may have found what was deleted before its first build began: that build says that its input is missing, and the
same command again makes it. In an object store this holds as long as whoever holds a lock shows a heartbeat once a
minute (`infra.locks`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from infra.locks import lock
from infra.storage import FileDamaged, Store
from pipelines.artifacts import MANIFEST, Artifact, Damaged, read_sealed, record_path
from pipelines.building import COLLECTING, begun_path
from pipelines.workflow.inventory import Inventory, Piece, node_folders, take_inventory
from pipelines.workflow.reach import DAY_S, TOMBSTONE, Published, Reach, reached, remembered_nodes, still_free

DELETERS = 8
WAIT_S = 30.0
"""Seconds to wait for builds that are about to begin, which hold the lock for a moment."""
RECORD = "record.json"


@dataclass
class Doomed:
    """What of one node is to be deleted, by key or by path in the store, and in words what stays and could go."""

    node: str
    answers: list[str] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)
    units: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)
    continuable: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    size_bytes: int = 0
    stays: list[str] = field(default_factory=list)
    unfinished_bytes: int = 0
    """Bytes of interrupted work that stays."""

    @property
    def is_empty(self) -> bool:
        return not any(
            (self.answers, self.revisions, self.units, self.unfinished, self.begun, self.continuable, self.parts)
        )


@contextlib.contextmanager
def collecting(store: Store) -> Iterator[None]:
    """Alone: no other collection, and no build that begins. Raises `infra.locks.Locked`."""
    with lock(store, COLLECTING, wait_s=WAIT_S):
        yield


def doomed(
    store: Store,
    nodes: Iterable[str],
    current: Iterable[Artifact],
    keep_runs: int,
    unfinished: bool,
    now_s: float,
) -> list[Doomed]:
    """What of the store nothing reaches, by node. `nodes` are those of the recipe, and `current` its artifacts.

    Raises `pipelines.workflow.reach.UnknownReach` if that can't be known, `StorageError` if the store doesn't answer.
    """
    folders = node_folders(store, {*nodes, *remembered_nodes(store)})
    inventories = {node: take_inventory(store, node) for node in folders}
    published = Published(store, inventories)
    reach = reached(published, current, keep_runs, unfinished, now_s)
    return [_Sieve(inventory, published, reach, unfinished, now_s).sift() for inventory in inventories.values()]


@dataclass
class _Sieve:
    """Sorts one node's pieces into what stays and what goes."""

    inventory: Inventory
    published: Published
    reach: Reach
    unfinished: bool
    now_s: float
    listed: set[str] = field(default_factory=set)
    """Units that any revision lists, kept or not, and those that an answer names as made besides."""

    def __post_init__(self) -> None:
        self.node = self.inventory.node
        self.found = Doomed(self.node)

    def sift(self) -> Doomed:
        for path, piece in self._old(self.inventory.parts):
            self._take(self.found.parts, path, piece)
        if self.node in self.reach.whole:
            self.found.stays.append(f"all of it: {self.reach.whole[self.node]}")
        else:
            self._revisions()
            self._units()
            self._work()
        return self.found

    def _old(self, pieces: Mapping[str, Piece]) -> list[tuple[str, Piece]]:
        return [(name, piece) for name, piece in pieces.items() if self.now_s - piece.modified_s >= DAY_S]

    def _take(self, into: list[str], name: str, piece: Piece) -> None:
        into.append(name)
        self.found.size_bytes += piece.size_bytes

    def _revisions(self) -> None:
        stays = {revision for node, revision in self.reach.revisions if node == self.node}
        for revision in self.inventory.revisions:
            try:
                self.listed |= {unit.key for unit in self.published.units(self.node, revision)}
            except (Damaged, FileDamaged) as error:
                if not self.unfinished:  # its units would count as interrupted work for ever
                    stays.add(revision)
                    self.found.stays.append(f"revision {revision[:12]}: {error}")
        for revision, piece in self._old(self.inventory.revisions):
            if revision not in stays:
                self._take(self.found.revisions, revision, piece)
        gone = set(self.found.revisions)
        for key, piece in self.inventory.answers.items():
            with contextlib.suppress(Damaged, FileDamaged):
                answer = self.published.answer(self.node, key) or {}
                self.listed |= set(answer.get("besides", ()))
                if answer.get("revision") in gone:
                    self._take(self.found.answers, key, piece)

    def _units(self) -> None:
        for key, piece in self._old(self.inventory.units):
            if (self.node, key) in self.reach.units:
                continue
            if RECORD not in piece.names or key in self.listed or self.unfinished:
                self._take(self.found.units, key, piece)
            else:
                self.found.unfinished_bytes += piece.size_bytes

    def _work(self) -> None:
        """Checkpoints and the like of units, what leads to them, and word of builds that were begun."""
        gone = set(self.found.units)
        pointed, all_known = _continuable(self.published.store, self.inventory)
        for key, piece in self._old(self.inventory.unfinished):
            left_over = key in self.listed and all_known and key not in pointed
            given_up = self.unfinished and key not in self.listed and (self.node, key) not in self.reach.units
            if key in gone or left_over or given_up:
                self._take(self.found.unfinished, key, piece)
                for path in pointed.get(key, ()):
                    self._take(self.found.continuable, path, self.inventory.continuable[path])
            elif key not in self.listed:
                self.found.unfinished_bytes += piece.size_bytes
        for key, piece in self._old(self.inventory.begun) if self.unfinished else ():
            self._take(self.found.begun, key, piece)


def _continuable(store: Store, inventory: Inventory) -> tuple[dict[str, list[str]], bool]:
    """By unit, the paths of what leads to its checkpoints; and whether all of these could be read."""
    pointed: dict[str, list[str]] = {}
    all_known = True
    for path in inventory.continuable:
        try:
            pointed.setdefault(read_sealed(store, path, {"unit": str})["unit"], []).append(path)
        except FileNotFoundError:
            continue
        except (Damaged, FileDamaged):
            all_known = False
    return pointed, all_known


def collect(store: Store, found: Iterable[Doomed]) -> list[str]:
    """Delete it; call it inside `collecting`. Nodes that somebody is at by now are left alone; returns their names."""
    wanted = {entry.node: entry for entry in found if not entry.is_empty}
    free = still_free(store, list(wanted))
    entries = [wanted[node] for node in free]
    with ThreadPoolExecutor(DELETERS) as pool:

        def delete(paths: Iterable[str]) -> None:
            for _ in pool.map(store.delete, paths):
                pass

        delete(path for entry in entries for path in _ways(entry))
        for _ in pool.map(lambda at: _bury(store, *at), [(e.node, rev) for e in entries for rev in e.revisions]):
            pass
        delete(record_path(entry.node, key) for entry in entries for key in entry.units)
        delete(
            f"{entry.node}/unfinished/{key}/{name}"
            for entry in entries
            for key in entry.unfinished
            for name in _manifests(store, f"{entry.node}/unfinished/{key}")
        )
        delete(path for entry in entries for path in _files(entry))
        delete(f"{entry.node}/revisions/{revision}" for entry in entries for revision in entry.revisions)
    return [node for node in wanted if node not in free]


def _ways(entry: Doomed) -> Iterator[str]:
    """What leads to something."""
    yield from (f"{entry.node}/keys/{key}.json" for key in entry.answers)
    yield from entry.continuable


def _files(entry: Doomed) -> Iterator[str]:
    yield from (f"{entry.node}/units/{key}" for key in entry.units)
    yield from (f"{entry.node}/unfinished/{key}" for key in entry.unfinished)
    yield from (begun_path(entry.node, key) for key in entry.begun)
    yield from entry.parts


def _bury(store: Store, node: str, revision: str) -> None:
    """A revision without its manifest, and a copy of that, by which the next collection knows what it was."""
    folder = f"{node}/revisions/{revision}"
    with contextlib.suppress(FileNotFoundError):
        store.publish_bytes(f"{folder}/{TOMBSTONE}", store.read_bytes(f"{folder}/{MANIFEST}"))
    store.delete(f"{folder}/{MANIFEST}")


def _manifests(store: Store, folder: str) -> list[str]:
    return [name for name in store.sizes(folder) if name.rpartition("/")[2] == MANIFEST]
