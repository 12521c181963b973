"""What a store has to keep: everything that a kept run, a release, unfinished work or running work reaches.

Roots are, of every recipe in the store, what each node has now and what its newest runs had; all that is younger than a
day; what unfinished builds read and take; of a release the model itself, for good, and what it was made from only
as long as a kept run reaches that. From there along the inputs of manifests. Where it can't be known what a root
reaches, nothing may be deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infra.locks import Locked, check_free
from infra.storage import FileDamaged, Store
from pipelines.artifacts import (
    ANSWER,
    MANIFEST,
    OF_MANIFEST,
    REMEDY,
    UNITS_TABLE,
    Artifact,
    ArtifactError,
    Damaged,
    Unit,
    find,
    read_sealed,
)
from pipelines.building import BEGUN, begun_path
from pipelines.workflow.inventory import Inventory
from pipelines.workflow.plan import LATEST
from pipelines.workflow.records import read_run, record_path, run_ids

DAY_S = 86_400.0
TOMBSTONE = "deleted.json"
"""A copy of its manifest in a revision that is being deleted."""
RELEASE = "release"
UNKNOWN = (Damaged, FileDamaged, FileNotFoundError)
"""What a file raises that was listed, and can't be read: nobody deletes it meanwhile."""


class UnknownReach(ArtifactError):
    """What a root reaches can't be read, so that nothing may be deleted; the message says which file and what to do."""


@dataclass
class Reach:
    """What is kept. `whole` are nodes of which everything stays, with the reason in words."""

    revisions: set[tuple[str, str]] = field(default_factory=set)
    units: set[tuple[str, str]] = field(default_factory=set)
    whole: dict[str, str] = field(default_factory=dict)


class Published:
    """What revisions and answers say, each read once."""

    def __init__(self, store: Store, inventories: Mapping[str, Inventory]) -> None:
        self.store = store
        self.inventories = inventories
        self._manifests: dict[tuple[str, str], Mapping[str, Any] | None] = {}
        self._units: dict[tuple[str, str], tuple[Unit, ...]] = {}

    def is_half_deleted(self, node: str, revision: str) -> bool:
        """Whether a collection began to delete it, and nobody has published it since."""
        names = self.inventories[node].revisions[revision].names
        return TOMBSTONE in names and MANIFEST not in names and names.get(UNITS_TABLE, 0.0) <= names[TOMBSTONE]

    def manifest(self, node: str, revision: str) -> Mapping[str, Any] | None:
        """The revision's manifest; None if there is no such revision any more. Raises `Damaged` if it is there, and
        can't be read."""
        at = (node, revision)
        if at not in self._manifests:
            there = node in self.inventories and revision in self.inventories[node].revisions
            if not there or self.is_half_deleted(node, revision):
                self._manifests[at] = None
            else:
                try:
                    self._manifests[at] = read_sealed(
                        self.store, f"{node}/revisions/{revision}/{MANIFEST}", OF_MANIFEST
                    )
                except FileNotFoundError:
                    raise Damaged(f"{self.store.location(f'{node}/revisions/{revision}')} has no manifest") from None
        return self._manifests[at]

    def units(self, node: str, revision: str) -> tuple[Unit, ...]:
        """Raises `Damaged` if they can't be read."""
        at = (node, revision)
        if at not in self._units:
            folder = f"{node}/revisions/{revision}"
            try:
                manifest = self.manifest(node, revision) or read_sealed(
                    self.store, f"{folder}/{TOMBSTONE}", OF_MANIFEST
                )
            except FileNotFoundError as error:
                raise Damaged(f"{self.store.location(folder)} has no manifest") from error
            self._units[at] = Artifact(node, "", revision, manifest, self.store).units
        return self._units[at]

    def answer(self, node: str, key: str) -> Mapping[str, Any] | None:
        """The key's answer; None if there is none. Raises `Damaged`."""
        path = f"{node}/keys/{key}.json"
        try:
            answer = read_sealed(self.store, path, ANSWER)
        except FileNotFoundError:
            return None
        if answer["key"] != key:
            raise Damaged(f"{self.store.location(path)} is of {answer['key']}; {REMEDY}")
        return answer


def reached(published: Published, current: Iterable[Artifact], keep_runs: int, unfinished: bool, now_s: float) -> Reach:
    """All that stays. `current` are the artifacts that the recipe asked for has now; with `unfinished`, builds that
    were begun and never finished are no roots, unless somebody is at them or they are younger than a day.

    Raises `UnknownReach`; `StorageError` if the store doesn't answer.
    """
    try:
        return _reached(published, current, keep_runs, unfinished, now_s)
    except (Damaged, FileDamaged) as error:
        raise UnknownReach(f"nothing is deleted, as it can't be known what is in use: {error}") from error


def _reached(
    published: Published, current: Iterable[Artifact], keep_runs: int, unfinished: bool, now_s: float
) -> Reach:
    reach, store = Reach(), published.store
    roots: set[tuple[str, str]] = set()
    asked: set[tuple[str, str]] = set()
    for artifact in current:
        roots.add((artifact.stage, artifact.revision))
        asked.add((artifact.stage, artifact.key))
    for recipe in store.listdir("recipes"):
        for node, latest in _remembered(store, recipe).items():
            roots.add((node, latest["revision"]))
            asked.add((node, latest["key"]))
        roots |= _of_runs(store, recipe, keep_runs)
    for node, inventory in published.inventories.items():
        busy = _busy(store, node)
        if busy:
            reach.whole[node] = busy
        asked |= {(node, key) for key, piece in inventory.answers.items() if now_s - piece.modified_s < DAY_S}
        roots |= {
            (node, revision)
            for revision, piece in inventory.revisions.items()
            if now_s - piece.modified_s < DAY_S and MANIFEST in piece.names
        }
        for key, piece in inventory.begun.items():
            if busy or not unfinished or now_s - piece.modified_s < DAY_S:
                roots |= _of_unfinished(published, node, key, reach)
    for node, key in asked:
        answer = published.answer(node, key)
        if answer is not None:
            roots |= {(node, answer["revision"]), *answer["inputs"].items()}
    _follow(published, roots, reach)
    return reach


def _follow(published: Published, roots: Iterable[tuple[str, str]], reach: Reach) -> None:
    pending = list(roots)
    while pending:
        at = pending.pop()
        manifest = None if at in reach.revisions else published.manifest(*at)
        if manifest is not None:
            reach.revisions.add(at)
            pending.extend(manifest["inputs"].items())
    for node, inventory in published.inventories.items():
        if node.partition(".")[0] == RELEASE:
            whole = {(node, rev) for rev, piece in inventory.revisions.items() if MANIFEST in piece.names}
            reach.revisions |= whole
    for node, revision in reach.revisions:
        reach.units |= {(node, unit.key) for unit in published.units(node, revision)}


def _remembered(store: Store, recipe: str) -> dict[str, Mapping[str, Any]]:
    names = [name for name in store.listdir(f"recipes/{recipe}") if name.endswith(".json")]
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        path = f"recipes/{recipe}/{name}"
        try:
            found[name.removesuffix(".json")] = read_sealed(store, path, LATEST)
        except UNKNOWN as error:
            raise _unknown(store, path, "`ldm run` of that recipe writes it anew") from error
    return found


def remembered_nodes(store: Store) -> set[str]:
    """Names of nodes that any recipe in the store has had."""
    return {
        name.removesuffix(".json")
        for recipe in store.listdir("recipes")
        for name in store.listdir(f"recipes/{recipe}")
        if name.endswith(".json")
    }


def _of_runs(store: Store, recipe: str, keep: int) -> set[tuple[str, str]]:
    """Revisions of the newest runs: until `keep` of them were done, each with another result than those after it."""
    found: set[tuple[str, str]] = set()
    results: set[frozenset[tuple[str, str]]] = set()
    for run_id in reversed(run_ids(store, recipe)):
        try:
            run = read_run(store, recipe, run_id)
        except UNKNOWN as error:
            raise _unknown(store, record_path(recipe, run_id), "what that run had is then kept no longer") from error
        has = frozenset((node, record.revision) for node, record in run.nodes.items())
        if run.state == "done" and has not in results:
            if len(results) == keep:
                break
            results.add(has)
        found |= has
    return found


def _of_unfinished(published: Published, node: str, key: str, reach: Reach) -> set[tuple[str, str]]:
    """What a build that was begun reads; what it takes goes into `reach`."""
    store = published.store
    try:
        begun = read_sealed(store, begun_path(node, key), BEGUN)
    except FileNotFoundError:
        return set()  # finished since it was listed
    except (Damaged, FileDamaged) as error:
        raise _unknown(store, begun_path(node, key), f"an interrupted {node} is then not kept for it") from error
    if find(store, node, key) is not None:
        return set()  # killed when all was published
    if begun["units"] is None:
        reach.whole.setdefault(node, f"a build of it was begun {begun['at']} and killed")
    else:
        reach.units |= {(node, unit_key) for unit_key in begun["units"]}
    return set(begun["inputs"].items())


def _unknown(store: Store, path: str, then: str) -> UnknownReach:
    return UnknownReach(
        f"nothing is deleted, as it can't be known what is in use: {store.location(path)} is damaged; delete that file"
        f" ({then}), and try again"
    )


def _busy(store: Store, node: str) -> str:
    """In words, who is making something of the node; empty if nobody is."""
    for name in store.listdir(f"locks/{node}"):
        try:
            check_free(store, f"{node}/{name}")
        except Locked as error:
            return str(error).partition(";")[0]
    return ""


def still_free(store: Store, nodes: Sequence[str]) -> list[str]:
    """The nodes, among these, that nobody is at now."""
    return [node for node in nodes if not _busy(store, node)]
