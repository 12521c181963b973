"""Units, artifacts, keys, revisions, manifests: *what* a stage publishes, and how it is found again.

    <store>/<stage>/units/<unit key>/...        one piece of work; exists when its record.json, written last, exists
    <store>/<stage>/revisions/<revision>/...    an immutable manifest that lists units, named by their content
    <store>/<stage>/keys/<key>.json             a small pointer: what was asked for -> the revision that answers it

A *key* is a hash of what was asked for (settings, input revisions, format version), a *revision* of what came out.
Downstream keys use input revisions, so an equal result stops the rebuild, and nothing published is ever edited.
How bytes become visible is `infra.storage`'s matter.
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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.locks import lock
from infra.storage import StorageError, Store

SCHEMA_VERSION = 1
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


class ArtifactError(Exception):
    """Something published is missing, damaged, or doesn't add up; the message says what and where."""


class CountsMismatch(ArtifactError):
    """in = kept + dropped + failed does not hold; nothing is published."""


def digest(value: Any) -> str:
    """32 hexadecimal digits of sha256 over canonical JSON: equal for equal values, whatever the order of keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Counts:
    """What became of everything that went in. `dropped` and `failed` are counts by reason."""

    total: int
    kept: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.total + other.total,
            self.kept + other.kept,
            _added(self.dropped, other.dropped),
            _added(self.failed, other.failed),
        )

    @property
    def num_dropped(self) -> int:
        return sum(self.dropped.values())

    @property
    def num_failed(self) -> int:
        return sum(self.failed.values())

    def check(self, where: str) -> None:
        """Raises `CountsMismatch` unless total = kept + dropped + failed."""
        if self.total != self.kept + self.num_dropped + self.num_failed:
            raise CountsMismatch(
                f"{where}: {self.total} in, but {self.kept} kept + {self.num_dropped} dropped + {self.num_failed}"
                f" failed = {self.kept + self.num_dropped + self.num_failed}; this is a defect, please report it"
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "total": self.total,
            "kept": self.kept,
            "dropped": dict(sorted(self.dropped.items())),
            "failed": dict(sorted(self.failed.items())),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Counts:
        return cls(value["total"], value["kept"], dict(value["dropped"]), dict(value["failed"]))


def _added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {reason: a.get(reason, 0) + b.get(reason, 0) for reason in sorted({*a, *b})}


@dataclass(frozen=True)
class FileEntry:
    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Unit:
    """One published piece of work. `info` holds small facts by which its stage and its readers know it."""

    stage: str
    key: str
    files: tuple[FileEntry, ...]
    counts: Counts
    info: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """Of the content alone: files and counts, not of when or where it was made.

        A stage whose files also tell such things gives the digest of the rest as `info["content"]`; one that only
        computes, whose numbers are rounded as threads, batches and devices have it, gives the unit's key.
        """
        if "content" in self.info:
            return digest([self.info["content"], self.counts.to_json()])
        return digest([[entry.name, entry.sha256] for entry in self.files] + [self.counts.to_json()])

    def path(self, name: str) -> str:
        """Path in the store of one of the unit's files. Raises `ArtifactError` if it has none of that name."""
        if all(entry.name != name for entry in self.files):
            raise ArtifactError(
                f"unit {self.stage}/{self.key} has no file {name!r}; it has {[e.name for e in self.files]}"
            )
        return f"{self.stage}/units/{self.key}/{name}"

    def only(self, suffix: str) -> str:
        """Path in the store of the unit's one file whose name ends with `suffix`."""
        names = [entry.name for entry in self.files if entry.name.endswith(suffix)]
        if len(names) != 1:
            raise ArtifactError(f"unit {self.stage}/{self.key} has {len(names)} files *{suffix}, expected one")
        return self.path(names[0])

    def to_json(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "key": self.key,
            "files": [[entry.name, entry.size_bytes, entry.sha256] for entry in self.files],
            "counts": self.counts.to_json(),
            "info": dict(self.info),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Unit:
        files = tuple(FileEntry(*entry) for entry in value["files"])
        return cls(value["stage"], value["key"], files, Counts.from_json(value["counts"]), value["info"])


@dataclass(frozen=True)
class Artifact:
    """An immutable result of a stage: its units, in the stage's order, and the manifest that lists them."""

    stage: str
    key: str
    revision: str
    units: tuple[Unit, ...]
    manifest: Mapping[str, Any]

    @property
    def counts(self) -> Counts:
        return Counts.from_json(self.manifest["counts"])

    @property
    def info(self) -> Mapping[str, Any]:
        """Small results that the stage wants remembered (metrics, sizes)."""
        info: Mapping[str, Any] = self.manifest["info"]
        return info

    @property
    def path(self) -> str:
        return f"{self.stage}/revisions/{self.revision}"


def artifact_key(stage: str, format_version: int, spec: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The key of what is asked for: `spec` without its execution block, `inputs` as node name -> revision."""
    return digest({"stage": stage, "format": format_version, "spec": spec, "inputs": dict(inputs)})


def find(store: Store, stage: str, key: str) -> Artifact | None:
    """The artifact that answers `key`, from its manifest alone; None if there is none or a rebuild was asked for."""
    names = (f"{stage}/keys/{key}.rebuild", f"{stage}/keys/{key}.json")
    if store.exists(names[0]) or not store.exists(names[1]):
        return None
    return load(store, stage, store.read_json(names[1])["revision"], key)


def finished(
    store: Store, stage: str, spec: Mapping[str, Any], inputs: Mapping[str, Artifact], format_version: int
) -> Artifact | None:
    """The artifact that answers this, if it is made already: with what a stage begins. See `building` and `find`."""
    return find(store, stage, artifact_key(stage, format_version, spec, _revisions(inputs)))


def load(store: Store, stage: str, revision: str, key: str = "") -> Artifact:
    """Raises `ArtifactError` if the revision's manifest or list of units is missing or damaged."""
    folder = f"{stage}/revisions/{revision}"
    try:
        manifest = store.read_json(f"{folder}/manifest.json")
        file = pq.ParquetFile(io.BytesIO(store.read_bytes(f"{folder}/units.parquet")), pre_buffer=False)
        table = file.read(use_threads=False)  # threads that just began abort a process that ends (pyarrow 25, seen)
    except (FileNotFoundError, pa.ArrowInvalid, StorageError) as error:
        raise ArtifactError(
            f"{store.location(folder)} is incomplete or damaged ({error}); make it again with `--force {stage}`"
        ) from error
    units = tuple(Unit.from_json(json.loads(record)) for record in table.column("record").to_pylist())
    return Artifact(stage, key or manifest["key"], revision, units, manifest)


def request_rebuild(store: Store, stage: str, key: str) -> None:
    """Have `key` made anew, from new units, by the next run that needs it; the old revision stays what it is.

    A rebuild that was asked for and did not finish goes on: asking again doesn't start it over.
    """
    if store.exists(f"{stage}/keys/{key}.json"):
        store.create(f"{stage}/keys/{key}.rebuild", uuid.uuid4().hex.encode())


@dataclass
class Build:
    """One artifact in the making. Finds the units that are there, publishes new ones, and at last the artifact."""

    store: Store
    stage: str
    key: str
    spec: Mapping[str, Any]
    inputs: Mapping[str, Artifact]
    execution: Mapping[str, Any]
    format_version: int
    rebuild: str
    started_s: float = field(default_factory=time.time)

    def unit_key(self, content: Mapping[str, Any]) -> str:
        """The key of the unit made from `content`: its input's hashes and the settings that affect it."""
        salt = {"rebuild": self.rebuild} if self.rebuild else {}
        return digest({"stage": self.stage, "format": self.format_version, "content": content} | salt)

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
            "spec": dict(self.spec),
            "execution": dict(self.execution),
            "inputs": {name: artifact.revision for name, artifact in self.inputs.items()},
            "num_units": len(ordered),
            "num_files": sum(len(unit.files) for unit in ordered),
            "size_bytes": sum(entry.size_bytes for unit in ordered for entry in unit.files),
            "versions": _package_versions(),
            "git_revision": _git_revision(),
            "started_at": _iso(self.started_s),
            "finished_at": _iso(time.time()),
            "duration_s": round(time.time() - self.started_s, 3),
        }
        folder = f"{self.stage}/revisions/{revision}"
        if self.rebuild or not self.store.exists(f"{folder}/manifest.json"):  # a rebuild heals a damaged revision
            self.store.publish_bytes(f"{folder}/units.parquet", _units_table(ordered))
            self.store.publish_bytes(f"{folder}/files.parquet", _files_table(ordered))
            self.store.publish_bytes(f"{folder}/manifest.json", _json(manifest))
        pointer = {"revision": revision, "key": self.key, "published_at": _iso(time.time())}
        self.store.publish_bytes(f"{self.stage}/keys/{self.key}.json", _json(pointer))
        self.store.delete(f"{self.stage}/keys/{self.key}.rebuild")
        return load(self.store, self.stage, revision, self.key)


@contextlib.contextmanager
def building(
    store: Store,
    stage: str,
    spec: Mapping[str, Any],
    inputs: Mapping[str, Artifact],
    execution: Mapping[str, Any],
    format_version: int,
) -> Iterator[Build]:
    """Make one artifact, alone: no other run can be making the same one meanwhile.

    Raises `infra.locks.Locked` with the owner's name if another run is at it.
    """
    key = artifact_key(stage, format_version, spec, _revisions(inputs))
    with lock(store, f"{stage}/{key}"):
        marker = f"{stage}/keys/{key}.rebuild"
        rebuild = store.read_bytes(marker).decode() if store.exists(marker) else ""
        yield Build(store, stage, key, spec, inputs, execution, format_version, rebuild)


def _revisions(inputs: Mapping[str, Artifact]) -> dict[str, str]:
    return {name: artifact.revision for name, artifact in inputs.items()}


def find_unit(store: Store, stage: str, unit_key: str) -> Unit | None:
    record = f"{stage}/units/{unit_key}/record.json"
    return Unit.from_json(store.read_json(record)) if store.exists(record) else None


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


def fetch_unit(store: Store, unit: Unit) -> Path:
    """The unit's folder as a local one: in the store itself if that is local, else in the node's cache."""
    for entry in unit.files:
        local = store.fetch(unit.path(entry.name))
    return local.parents[entry.name.count("/")]


def fetch_folder(store: Store, unit: Unit, name: str) -> Path:
    """The unit's files under the folder `name` ("unet"), as a local folder. Raises `ArtifactError` if it has none."""
    entries = tuple(entry for entry in unit.files if entry.name.startswith(f"{name}/"))
    if not entries:
        raise ArtifactError(
            f"unit {unit.stage}/{unit.key} has no folder {name!r}; it has {[e.name for e in unit.files]}"
        )
    return fetch_unit(store, replace(unit, files=entries)) / name


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


def _iso(time_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))


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
