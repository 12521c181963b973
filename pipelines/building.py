"""Making an artifact: alone, unit by unit, and again where a person asks for it.

A unit's *base key* is a hash of what it is made from. A unit that was made anew, by `--force` or because rows of it
were asked for again, has a key of its own, and `<stage>/renewed/<base key>.json` leads from the one to the other, so
that every later run finds the newer one. What is to be made again is a marker in the store until it is done: a run that
dies goes on with it. So is what was begun: `<stage>/begun/<key>.json` says what a build reads and which units it takes,
until the artifact is published, and nothing deletes that meanwhile (`pipelines.workflow.reach`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import platform
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from infra.locks import Locked, lock
from infra.storage import StorageError, Store
from pipelines.artifacts import (
    ANSWER,
    FILES_TABLE,
    MANIFEST,
    OF_THE_ANSWER,
    REMEDY,
    UNITS_TABLE,
    Artifact,
    ArtifactError,
    Counts,
    Damaged,
    FileEntry,
    Identity,
    Unit,
    again_path,
    answered,
    artifact_key,
    digest,
    file_sha256,
    find,
    find_unit,
    load,
    read_sealed,
    record_path,
    revisions,
    sealed,
)

SCHEMA_VERSION = 3
COLLECTING = "gc"
"""Lock of whoever deletes what nothing reaches: no build begins meanwhile."""
COLLECTING_WAIT_S = 900.0
LOCK_WAIT_S = 1.0
"""As long as somebody may look whether a lock is held, by taking it."""
TRACKED_PACKAGES = (
    "latentworks",
    "torch",
    "deepspeed",
    "ray",
    "img2dataset",
    "webdataset",
    "transformers",
    "pyarrow",
    "numpy",
    "opencv-python-headless",
    "pillow",
)

AGAIN = {"why": str, "salt": str, "reasons": list}
BEGUN = {"inputs": dict, "units": object, "at": str}
Why = Literal["force", "retry", "repair"]
WEIGHT: Mapping[Why, int] = {"repair": 0, "retry": 1, "force": 2}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Again:
    """What is to be made again. `force`: everything, from nothing; `retry`: rows with these `reasons`; `repair`: the
    units that are gone. `salt` is in the keys of units that are made anew."""

    why: Why
    salt: str
    reasons: tuple[str, ...] = ()


class InputsDamaged(ArtifactError):
    """Files that a stage is to read are missing, or cut short; the message lists some of them, and what to do."""


def ask_again(store: Store, stage: str, key: str, why: Why, reasons: Sequence[str] = ()) -> None:
    """Have `key` made again by the next run that needs it; the old revision stays what it is.

    What was asked for and did not finish goes on: asking the same again doesn't start it over, and asking for less
    takes nothing back. `force` makes everything, `retry` also the units that are gone; reasons add up, and none given
    are all of them.
    """
    known = asked_again(store, stage, key)
    wanted = tuple(sorted(set(reasons)))
    if known is not None:
        if known.why == "retry" and why == "retry":
            wanted = tuple(sorted({*known.reasons, *wanted})) if known.reasons and wanted else ()
        if WEIGHT[known.why] > WEIGHT[why] or (known.why, known.reasons) == (why, wanted):
            return
    value = {"why": why, "salt": uuid.uuid4().hex, "reasons": list(wanted)}
    store.publish_bytes(again_path(stage, key), sealed(value))


def asked_again(store: Store, stage: str, key: str) -> Again | None:
    """What of `key` is to be made again, if anything.

    Where it can't be read any more, the least: what is missing.
    """
    try:
        value = read_sealed(store, again_path(stage, key), AGAIN)
    except FileNotFoundError:
        return None
    except Damaged as error:
        logger.warning("%s; what is missing is made. Ask again with --force or --retry if it was for more", error)
        return Again("repair", "")
    return Again(value["why"], value["salt"], tuple(value["reasons"]))


def begun_path(stage: str, key: str) -> str:
    return f"{stage}/begun/{key}.json"


def renewed_path(stage: str, base_key: str) -> str:
    return f"{stage}/renewed/{base_key}.json"


def renewed(base_key: str, unit_key: str) -> bytes:
    """What leads from the base key to the unit that was made anew for it."""
    return sealed({"base": base_key, "unit": unit_key})


def read_renewed(store: Store, stage: str, base_key: str) -> str:
    """Key of the unit that was last made anew for the base key. Raises `FileNotFoundError`, `Damaged`."""
    path = renewed_path(stage, base_key)
    value = read_sealed(store, path, {"unit": str})
    if value.get("base", base_key) != base_key:  # older ones don't say
        raise Damaged(f"{store.location(path)} is of {value['base']}; {REMEDY}")
    return str(value["unit"])


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
        """The same for a base key: of the unit that was last made anew for it, or is now.

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
            "versions": dict(_package_versions()),
            "git_revision": _git_revision(),
            "started_at": iso(self.started_s),
            "finished_at": iso(time.time()),
            "duration_s": round(time.time() - self.started_s, 3),
        }
        own = {unit.key for unit in ordered}
        # Two questions with one answer, made at the same time, take turns.
        with lock(self.store, f"{self.stage}/{revision}", wait_s=60.0):
            before = _listed(self.store, self.stage, revision)
            anew = self.again is not None or before is None
            if anew:
                publish_revision(self.store, self.stage, answer, ordered, self._bases)
        listed = own if anew else before or set()
        answer["besides"] = sorted({*self._besides(), *own, *(before or ())} - listed)
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


def publish_unit(
    store: Store,
    stage: str,
    unit_key: str,
    files: Mapping[str, Path | bytes],
    counts: Counts,
    info: Mapping[str, Any] | None = None,
) -> Unit:
    """Publish the files of one unit, then its record. Safe to call from any process, and to repeat.

    Raises `CountsMismatch`, and `StorageError` if the store can't be written.
    """
    counts.check(f"{stage} unit {unit_key}")
    folder = f"{stage}/units/{unit_key}"
    entries = []
    for name, content in sorted(files.items()):
        if isinstance(content, bytes):
            entries.append(FileEntry(name, len(content), hashlib.sha256(content).hexdigest()))
            store.publish_bytes(f"{folder}/{name}", content)
        else:
            entries.append(FileEntry(name, content.stat().st_size, file_sha256(content)))
            store.publish_file(f"{folder}/{name}", content)
    record = sealed(Unit(stage, unit_key, tuple(entries), counts, dict(info or {})).to_json())
    store.publish_bytes(record_path(stage, unit_key), record)
    return Unit.from_json(json.loads(record))


def publish_revision(
    store: Store, stage: str, answer: Mapping[str, Any], units: Sequence[Unit], bases: Mapping[str, str]
) -> None:
    """Publish the tables and the manifest of `answer`'s revision. `bases` are the base keys of units made anew."""
    revision = answer["revision"]
    tables = {UNITS_TABLE: _units_table(units, bases), FILES_TABLE: _files_table(units)}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "stage": stage,
        "key": answer["key"],
        "revision": revision,
        **{name: answer[name] for name in OF_THE_ANSWER},
        "num_units": len(units),
        "num_files": sum(len(unit.files) for unit in units),
        "size_bytes": sum(entry.size_bytes for unit in units for entry in unit.files),
        "tables": {name: hashlib.sha256(data).hexdigest() for name, data in tables.items()},
    }
    folder = f"{stage}/revisions/{revision}"
    for name, data in tables.items():
        store.publish_bytes(f"{folder}/{name}", data)
    store.publish_bytes(f"{folder}/{MANIFEST}", sealed(manifest))


def iso(time_s: float) -> str:
    """ "2026-11-26T05:12:00Z"."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))


def _listed(store: Store, stage: str, revision: str) -> set[str] | None:
    """Keys of the units that the revision lists; None unless it is published, and all of it is what was written."""
    try:
        artifact = load(store, stage, revision)
        files = store.read_bytes(f"{artifact.path}/{FILES_TABLE}")
        if hashlib.sha256(files).hexdigest() != artifact.manifest["tables"][FILES_TABLE]:
            return None
        return {unit.key for unit in artifact.units}
    except (ArtifactError, FileNotFoundError):
        return None


def _units_table(units: Sequence[Unit], bases: Mapping[str, str]) -> bytes:
    return _parquet(
        {
            "key": [unit.key for unit in units],
            "digest": [unit.digest for unit in units],
            "record": [json.dumps(unit.to_json(), sort_keys=True) for unit in units],
            "base": [bases.get(unit.key, unit.key) for unit in units],
        }
    )


def _files_table(units: Sequence[Unit]) -> bytes:
    rows = [(unit.path(entry.name), entry) for unit in units for entry in unit.files]
    return _parquet(
        {
            "path": [path for path, _ in rows],
            "size_bytes": [entry.size_bytes for _, entry in rows],
            "sha256": [entry.sha256 for _, entry in rows],
        }
    )


def _parquet(columns: Mapping[str, list[Any]]) -> bytes:
    sink = io.BytesIO()
    types = {"size_bytes": pa.int64()}
    arrays = {name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), sink)
    return sink.getvalue()


@functools.cache
def _package_versions() -> Mapping[str, str]:
    versions = {"python": platform.python_version()}
    for name in TRACKED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@functools.cache
def _git_revision() -> str | None:
    """Revision of the checkout that the code was loaded from; None where it runs from an installed wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
