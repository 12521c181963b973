"""Making an artifact: alone, unit by unit, from inputs that are there, and again where a person asks for it.

What was begun is in the store until it is done: `<stage>/begun/<key>.json` says what a build reads and which units it
takes, until the artifact is published, and nothing deletes that meanwhile (`pipelines.workflow.reach`). How files,
tables and manifests are written is `pipelines.publishing`'s matter, what is to be made again `pipelines.again`'s.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from infra.locks import Locked, lock
from infra.storage import StorageError, Store
from pipelines.again import Again, asked_again, read_renewed, renewed, renewed_path
from pipelines.artifacts import (
    ANSWER,
    Artifact,
    ArtifactError,
    Counts,
    Damaged,
    Identity,
    Unit,
    again_path,
    answered,
    artifact_key,
    digest,
    find,
    find_unit,
    load,
    read_sealed,
    revisions,
    sealed,
)
from pipelines.publishing import git_revision, iso, listed, package_versions, publish_revision

COLLECTING = "gc"
"""Lock of whoever deletes what nothing reaches: no build begins meanwhile."""
COLLECTING_WAIT_S = 900.0
LOCK_WAIT_S = 1.0
"""Seconds that somebody may take to look whether a lock is held, by taking it."""
BEGUN = {"inputs": dict, "units": object, "at": str}

logger = logging.getLogger(__name__)


class InputsDamaged(ArtifactError):
    """Files that a stage is to read are missing, or cut short; the message lists some of them, and what to do."""


def begun_path(stage: str, key: str) -> str:
    return f"{stage}/begun/{key}.json"


@dataclass
class Build:
    """One artifact in the making. Finds the units that are there, publishes new ones, and at last the artifact."""

    store: Store
    stage: str
    key: str
    identity: Identity
    inputs: Mapping[str, Artifact]
    execution: Mapping[str, Any]
    format_version: int
    again: Again | None
    started_s: float = field(default_factory=time.time)
    planned: set[str] = field(default_factory=set)
    """Keys of the units that were asked for."""
    _anew: dict[str, str] = field(default_factory=dict)
    _bases: dict[str, str] = field(default_factory=dict)

    def base_key(self, content: Mapping[str, Any]) -> str:
        """Hash of what a unit is made from: its input's hashes and the content that affects it."""
        return digest({"stage": self.stage, "format": self.format_version, "content": content})

    def unit_key(self, content: Mapping[str, Any]) -> str:
        """The key under which the unit made from `content` is found, or to be made."""
        return self.current(self.base_key(content))

    def current(self, base_key: str) -> str:
        """The key of the unit that was last made anew for a base key, or is now.

        Raises `Damaged` if that can't be read: an older unit may have what was taken down since.
        """
        if self.again is not None and self.again.why == "force":
            return self.renew(base_key)
        unit_key = base_key
        if base_key in self._renewed:
            unit_key = read_renewed(self.store, self.stage, base_key)
            self._bases[unit_key] = base_key
        self.planned.add(unit_key)
        return unit_key

    def renew(self, base_key: str) -> str:
        """A key for a unit that takes the place of the base key's from when the artifact is published."""
        assert self.again is not None, "nothing was asked for again"
        unit_key = digest([base_key, self.again.salt])
        self._anew[base_key] = unit_key
        self._bases[unit_key] = base_key
        self.planned.add(unit_key)
        return unit_key

    def _besides(self) -> list[str]:
        """Keys of units with the content of listed ones, which nothing reads: what was made twice."""
        try:
            return list(read_sealed(self.store, f"{self.stage}/keys/{self.key}.json", ANSWER).get("besides", ()))
        except (FileNotFoundError, Damaged):
            return []

    @functools.cached_property
    def _renewed(self) -> set[str]:
        return {name.removesuffix(".json") for name in self.store.listdir(f"{self.stage}/renewed")}

    def find_unit(self, unit_key: str) -> Unit | None:
        return find_unit(self.store, self.stage, unit_key)

    def publish(
        self, units: Iterable[Unit], counts: Counts | None = None, info: Mapping[str, Any] | None = None
    ) -> Artifact:
        """Publish the artifact: its revision, unless it is there and sound, and then the answer that leads to it.

        `counts` are the sum over the units unless given. Raises `CountsMismatch` if they do not add up.
        """
        ordered = tuple(units)
        total = counts or sum((unit.counts for unit in ordered), Counts(0, 0))
        for unit in ordered:
            unit.counts.check(f"{self.stage} unit {unit.key}")
        total.check(self.stage)
        revision = digest(sorted(unit.digest for unit in ordered))
        answer = {
            "revision": revision,
            "key": self.key,
            "format_version": self.format_version,
            "counts": total.to_json(),
            "info": dict(info or {}),
            "spec": dict(self.identity.settings),
            "content": dict(self.identity.content),
            "execution": dict(self.execution),
            "inputs": revisions(self.inputs),
            "versions": dict(package_versions()),
            "git_revision": git_revision(),
            "started_at": iso(self.started_s),
            "finished_at": iso(time.time()),
            "duration_s": round(time.time() - self.started_s, 3),
        }
        own = {unit.key for unit in ordered}
        # Two questions with one answer, made at the same time, take turns.
        with lock(self.store, f"{self.stage}/{revision}", wait_s=60.0):
            before = listed(self.store, self.stage, revision)
            anew = self.again is not None or before is None
            if anew:
                publish_revision(self.store, self.stage, answer, ordered, self._bases)
        answer["besides"] = sorted({*self._besides(), *own, *(before or ())} - (own if anew else before or set()))
        self._lead_to(own)
        data = sealed(answer)
        self.store.publish_bytes(f"{self.stage}/keys/{self.key}.json", data)
        artifact = load(self.store, self.stage, revision, self.key)
        self._end()
        return answered(artifact, json.loads(data))

    def settle(self, units: Iterable[Unit]) -> None:
        """End what was asked for again although nothing can be published: its units are found from now on."""
        self._lead_to({unit.key for unit in units})
        self._end()

    def _lead_to(self, made: set[str]) -> None:
        """Have base keys lead to those of the units made anew that there are."""
        for base_key, unit_key in self._anew.items():
            if unit_key in made:
                self.store.publish_bytes(renewed_path(self.stage, base_key), renewed(base_key, unit_key))

    def _end(self) -> None:
        """What was asked for again is done; what was asked for meanwhile stays."""
        if self.again is not None and asked_again(self.store, self.stage, self.key) == self.again:
            self.store.delete(again_path(self.stage, self.key))
        self.store.delete(begun_path(self.stage, self.key))


def find_or_build(
    store: Store,
    stage: str,
    identity: Identity,
    inputs: Mapping[str, Artifact],
    execution: Mapping[str, Any],
    format_version: int,
    build: Callable[[Build], Artifact],
) -> Artifact:
    """The artifact that answers what is asked for: the one that is there, from its manifest alone, or what `build`
    publishes. Raises what `building` and `build` raise."""
    found = find(store, stage, artifact_key(stage, format_version, identity.content, inputs))
    if found is not None:
        return found
    with building(store, stage, identity, inputs, execution, format_version) as begun:
        return build(begun)


@contextlib.contextmanager
def building(
    store: Store,
    stage: str,
    identity: Identity,
    inputs: Mapping[str, Artifact],
    execution: Mapping[str, Any],
    format_version: int,
) -> Iterator[Build]:
    """Make one artifact, alone: no other run can be making the same one meanwhile, and what it reads is kept.

    Raises `infra.locks.Locked` with the owner's name if another run is at it, `InputsDamaged` if there is too little to
    make it from.
    """
    key = artifact_key(stage, format_version, identity.content, inputs)
    with lock(store, f"{stage}/{key}", wait_s=LOCK_WAIT_S):
        begun = {"inputs": revisions(inputs), "units": None, "at": iso(time.time())}
        store.publish_bytes(begun_path(stage, key), sealed(begun))
        _let_collect(store)
        check_inputs(store, inputs)
        build = Build(store, stage, key, identity, inputs, execution, format_version, asked_again(store, stage, key))
        try:
            yield build
        except BaseException:
            with contextlib.suppress(StorageError):  # then all of the stage's units are kept for it
                store.publish_bytes(begun_path(stage, key), sealed(begun | {"units": sorted(build.planned)}))
            raise


def _let_collect(store: Store) -> None:
    """Wait for whoever deletes what nothing reaches: either it saw our lock and what was begun, or it is waited for."""
    try:
        with lock(store, COLLECTING, wait_s=LOCK_WAIT_S):
            return
    except Locked as error:
        logger.warning("waiting for `ldm store gc`: %s", error)
    with lock(store, COLLECTING, wait_s=COLLECTING_WAIT_S):
        return


def check_inputs(store: Store, inputs: Mapping[str, Artifact]) -> None:
    """Raises `InputsDamaged` if a file of the inputs' units is missing or has another size than was recorded of it.

    One listing for each input: what is missing is said once and at the start, before a worker meets it, is retried,
    and meets it again. Flipped bits are left to `ldm store verify`.
    """
    faults = [fault for artifact in inputs.values() for fault in _faults(store, artifact)]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputsDamaged(
            f"{', '.join(faults[:3])}{more}; find and mend it with `ldm store verify RECIPE --repair`, then `ldm run"
            " RECIPE` again"
        )


def _faults(store: Store, artifact: Artifact) -> list[str]:
    folder = f"{artifact.stage}/units"
    alone = f"/{artifact.units[0].key}" if len(artifact.units) == 1 else ""
    sizes = store.sizes(folder + alone)
    faults = []
    for unit in artifact.units:
        for entry in unit.files:
            found = sizes.get(entry.name if alone else f"{unit.key}/{entry.name}")
            if found != entry.size_bytes:
                what = "is missing" if found is None else f"has {found} of {entry.size_bytes} bytes"
                faults.append(f"{store.location(unit.path(entry.name))} {what}")
    return faults
