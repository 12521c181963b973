"""Making an artifact: alone, unit by unit, and again where a person asks for it.

A unit's *base key* is a hash of what it is made from. A unit that was made anew, by `--force` or because rows of it were
asked for again, has a key of its own, and `<stage>/renewed/<base key>.json` leads from the one to the other, so that
every later run finds the newer one. What is to be made again is a marker in the store until it is done: a run that dies
goes on with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import platform
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from infra.locks import lock
from infra.storage import Store
from pipelines.artifacts import (
    Artifact,
    ArtifactError,
    Counts,
    FileEntry,
    Identity,
    Unit,
    again_path,
    artifact_key,
    digest,
    file_sha256,
    find_unit,
    load,
    revisions,
)

SCHEMA_VERSION = 2
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

Why = Literal["force", "retry", "repair"]


@dataclass(frozen=True)
class Again:
    """What is to be made again. `force`: everything, from nothing; `retry`: rows with these `reasons`; `repair`: the
    units that are gone. `salt` is in the keys of units that are made anew."""

    why: Why
    salt: str
    reasons: tuple[str, ...] = ()


def ask_again(store: Store, stage: str, key: str, why: Why, reasons: Sequence[str] = ()) -> None:
    """Have `key` made again by the next run that needs it; the old revision stays what it is.

    What was asked for and did not finish goes on: asking the same again doesn't start it over.
    """
    known = asked_again(store, stage, key)
    if known is not None and (known.why, known.reasons) == (why, tuple(reasons)):
        return
    value = {"why": why, "salt": uuid.uuid4().hex, "reasons": list(reasons)}
    store.publish_bytes(again_path(stage, key), _json(value))


def asked_again(store: Store, stage: str, key: str) -> Again | None:
    """What of `key` is to be made again, if anything."""
    path = again_path(stage, key)
    if not store.exists(path):
        return None
    value = store.read_json(path)
    return Again(value["why"], value["salt"], tuple(value["reasons"]))


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
    _anew: dict[str, str] = field(default_factory=dict)

    def base_key(self, content: Mapping[str, Any]) -> str:
        """Hash of what a unit is made from: its input's hashes and the content that affects it."""
        return digest({"stage": self.stage, "format": self.format_version, "content": content})

    def unit_key(self, content: Mapping[str, Any]) -> str:
        """The key under which the unit made from `content` is found, or to be made."""
        return self.current(self.base_key(content))

    def current(self, base_key: str) -> str:
        """The same for a base key: of the unit that was last made anew for it, or is now."""
        if self.again is not None and self.again.why == "force":
            return self.renew(base_key)
        return self._renewed.get(base_key, base_key)

    def renew(self, base_key: str) -> str:
        """A key for a unit that takes the place of the base key's from when the artifact is published."""
        assert self.again is not None, "nothing was asked for again"
        self._anew[base_key] = digest([base_key, self.again.salt])
        return self._anew[base_key]

    @cached_property
    def _renewed(self) -> dict[str, str]:
        folder = f"{self.stage}/renewed"
        names = [name.removesuffix(".json") for name in self.store.listdir(folder)]
        return {name: str(self.store.read_json(f"{folder}/{name}.json")["unit"]) for name in names}

    def find_unit(self, unit_key: str) -> Unit | None:
        return find_unit(self.store, self.stage, unit_key)

    def publish(
        self, units: Iterable[Unit], counts: Counts | None = None, info: Mapping[str, Any] | None = None
    ) -> Artifact:
        """Publish the artifact: manifest, then pointer.

        `counts` are the sum over the units unless given. Raises `CountsMismatch` if they do not add up.
        """
        ordered = tuple(units)
        total = counts or sum((unit.counts for unit in ordered), Counts(0, 0))
        for unit in ordered:
            unit.counts.check(f"{self.stage} unit {unit.key}")
        total.check(self.stage)
        revision = digest(sorted(unit.digest for unit in ordered))
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "stage": self.stage,
            "key": self.key,
            "revision": revision,
            "format_version": self.format_version,
            "counts": total.to_json(),
            "info": dict(info or {}),
            "spec": dict(self.identity.settings),
            "content": dict(self.identity.content),
            "execution": dict(self.execution),
            "inputs": revisions(self.inputs),
            "num_units": len(ordered),
            "num_files": sum(len(unit.files) for unit in ordered),
            "size_bytes": sum(entry.size_bytes for unit in ordered for entry in unit.files),
            "versions": _package_versions(),
            "git_revision": _git_revision(),
            "started_at": iso(self.started_s),
            "finished_at": iso(time.time()),
            "duration_s": round(time.time() - self.started_s, 3),
        }
        folder = f"{self.stage}/revisions/{revision}"
        if self.again is not None or not _is_sound(self.store, self.stage, revision):
            self.store.publish_bytes(f"{folder}/units.parquet", _units_table(ordered))
            self.store.publish_bytes(f"{folder}/files.parquet", _files_table(ordered))
            self.store.publish_bytes(f"{folder}/manifest.json", _json(manifest))
        for base_key, unit_key in self._anew.items():
            self.store.publish_bytes(f"{self.stage}/renewed/{base_key}.json", _json({"unit": unit_key}))
        pointer = {"revision": revision, "key": self.key, "published_at": iso(time.time())}
        self.store.publish_bytes(f"{self.stage}/keys/{self.key}.json", _json(pointer))
        self.store.delete(again_path(self.stage, self.key))
        return load(self.store, self.stage, revision, self.key)


@contextlib.contextmanager
def building(
    store: Store,
    stage: str,
    identity: Identity,
    inputs: Mapping[str, Artifact],
    execution: Mapping[str, Any],
    format_version: int,
) -> Iterator[Build]:
    """Make one artifact, alone: no other run can be making the same one meanwhile.

    Raises `infra.locks.Locked` with the owner's name if another run is at it.
    """
    key = artifact_key(stage, format_version, identity.content, inputs)
    with lock(store, f"{stage}/{key}"):
        again = asked_again(store, stage, key)
        yield Build(store, stage, key, identity, inputs, execution, format_version, again)


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
    unit = Unit(stage, unit_key, tuple(entries), counts, dict(info or {}))
    store.publish_bytes(f"{folder}/record.json", _json(unit.to_json()))
    return unit


def iso(time_s: float) -> str:
    """ "2026-11-26T05:12:00Z"."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))


def _is_sound(store: Store, stage: str, revision: str) -> bool:
    """Whether the revision is published, and can be read."""
    try:
        return bool(load(store, stage, revision).units) or True
    except ArtifactError:
        return False


def _units_table(units: tuple[Unit, ...]) -> bytes:
    return _parquet(
        {
            "key": [unit.key for unit in units],
            "digest": [unit.digest for unit in units],
            "record": [json.dumps(unit.to_json(), sort_keys=True) for unit in units],
        }
    )


def _files_table(units: tuple[Unit, ...]) -> bytes:
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


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in TRACKED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _git_revision() -> str | None:
    """Revision of the checkout that the code runs from; None where it runs from an installed wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
