"""Units, artifacts, keys, revisions, manifests: *what* a stage publishes, and how it is found again.

    <store>/<stage>/units/<unit key>/...        one piece of work; exists when its record.json, written last, exists
    <store>/<stage>/revisions/<revision>/...    an immutable manifest that lists units, named by their content
    <store>/<stage>/keys/<key>.json             the answer to what was asked for: which revision, and what it was asked
    <store>/<stage>/keys/<key>.again            asked for again: see `pipelines.again`

A *key* is a hash of what was asked for (content, input revisions, format version), a *revision* of what came out.
Downstream keys use input revisions, so an equal result stops the rebuild, and nothing published is ever edited. Two
questions may have one revision: what belongs to the question (settings, inputs, times) is in its answer as well.

Each JSON file is sealed, it has a sum of itself, and a manifest has those of its tables: a flipped bit is noticed.
Making them is `pipelines.building`'s matter, how bytes become visible `infra.storage`'s.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Store
from pipelines.errors import LatentworksError

logger = logging.getLogger(__name__)


class ArtifactError(LatentworksError):
    """Something published is missing, damaged, or doesn't add up; the message says what and where."""


class CountsMismatch(ArtifactError):
    """in = kept + dropped + failed does not hold; nothing is published."""


class Damaged(ArtifactError):
    """A file that says what is published is not what was written."""


UNITS_TABLE, FILES_TABLE, MANIFEST = "units.parquet", "files.parquet", "manifest.json"
REMEDY = "`ldm store verify RECIPE --repair` mends it, or has it made again"
OF_THE_ANSWER = (
    "format_version",
    "counts",
    "info",
    "spec",
    "content",
    "execution",
    "inputs",
    "versions",
    "git_revision",
    "started_at",
    "finished_at",
    "duration_s",
)
"""What of a manifest belongs to the question, and so is in the answer too: an equal revision has others."""
ANSWER: Mapping[str, type] = {
    **dict.fromkeys(("revision", "key"), str),
    **dict.fromkeys(OF_THE_ANSWER, object),
    **dict.fromkeys(("counts", "info", "spec", "content", "inputs"), dict),
}
"""Names and types of what is in every answer."""
OF_MANIFEST: Mapping[str, type] = {**ANSWER, "tables": dict}
UNREADABLE = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, AttributeError)
"""What a table or a record raises that is not one."""


def digest(value: Any) -> str:
    """32 hexadecimal digits of sha256 over canonical JSON: equal for equal values, whatever the order of keys."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def sealed(value: Mapping[str, Any]) -> bytes:
    """JSON with a `sum` of all the rest, so that `read_sealed` notices any change of it."""
    plain = json.loads(json.dumps({name: entry for name, entry in value.items() if name != "sum"}, allow_nan=False))
    text = json.dumps(plain | {"sum": digest(plain)}, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def read_sealed(store: Store, path: str, names: Mapping[str, type] | None = None) -> dict[str, Any]:
    """What `sealed` made of it. `names` are in it, each with a value of that type, unless it is another file's content.

    Raises `FileNotFoundError`, `Damaged`; `StorageError` if the store doesn't answer.
    """
    data = store.read_bytes(path)
    try:
        value = json.loads(data)
        if isinstance(value, dict) and sealed(value) == data and _has(value, names or {}):
            return value
    except (ValueError, RecursionError):  # a flipped bit may make anything of it
        pass
    raise Damaged(f"{store.location(path)} is not what was written; {REMEDY}")


def _has(value: Mapping[str, Any], names: Mapping[str, type]) -> bool:
    return all(name in value and isinstance(value[name], wanted) for name, wanted in names.items())


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
        """Digest of the content alone: files and counts, not of when or where it was made.

        A stage whose files also tell such things gives the digest of the rest as `info["content"]`; one that only
        computes, whose numbers are rounded as threads, batches and devices have it, gives the unit's key.
        """
        if "content" in self.info:
            return digest([self.info["content"], self.counts.to_json()])
        return digest([[entry.name, entry.sha256] for entry in self.files] + [self.counts.to_json()])

    def has(self, name: str) -> bool:
        return any(entry.name == name for entry in self.files)

    def path(self, name: str) -> str:
        """Path in the store of one of the unit's files. Raises `ArtifactError` if it has none of that name."""
        if all(entry.name != name for entry in self.files):
            raise ArtifactError(
                f"unit {self.stage}/{self.key} has no file {name!r}; it has {[e.name for e in self.files]}"
            )
        return f"{self.stage}/units/{self.key}/{name}"

    def entry(self, suffix: str) -> FileEntry:
        """The unit's one file whose name ends with `suffix`. Raises `ArtifactError` if there are none or several."""
        found = [entry for entry in self.files if entry.name.endswith(suffix)]
        if len(found) != 1:
            raise ArtifactError(f"unit {self.stage}/{self.key} has {len(found)} files *{suffix}, expected one")
        return found[0]

    def only(self, suffix: str) -> str:
        """Path in the store of `entry`."""
        return self.path(self.entry(suffix).name)

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
        return cls(value["stage"], value["key"], files, Counts.from_json(value["counts"]), dict(value["info"]))


@dataclass(frozen=True)
class Identity:
    """What a node is asked for. `content` alone decides over its key; `settings` are all of its settings, manners and
    neutral values included, for manifests and people."""

    content: Mapping[str, Any]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Artifact:
    """An immutable result of a stage, by its manifest. Its units, in the stage's order, are read when asked for."""

    stage: str
    key: str
    revision: str
    manifest: Mapping[str, Any]
    store: Store

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """Raises `ArtifactError` if the list of units is missing or damaged."""
        path = f"{self.path}/{UNITS_TABLE}"
        try:
            data = self.store.read_bytes(path)
            if not _is_table(data, self.manifest):
                # Perhaps this revision was published anew since its manifest was read.
                manifest = load(self.store, self.stage, self.revision).manifest
                data = self.store.read_bytes(path)
                if not _is_table(data, manifest):
                    raise Damaged(f"{self.store.location(path)} is not what was written; {REMEDY}")
        except FileNotFoundError as error:
            raise Damaged(f"{self.store.location(path)} is missing; {REMEDY}") from error
        return read_units(data)

    @property
    def counts(self) -> Counts:
        return Counts.from_json(self.manifest["counts"])

    @property
    def info(self) -> Mapping[str, Any]:
        """Small results that the stage wants remembered (metrics, sizes)."""
        info: Mapping[str, Any] = self.manifest["info"]
        return info

    @property
    def settings(self) -> Mapping[str, Any]:
        """All settings that it was made with."""
        settings: Mapping[str, Any] = self.manifest["spec"]
        return settings

    @property
    def path(self) -> str:
        return f"{self.stage}/revisions/{self.revision}"


def artifact_key(stage: str, format_version: int, content: Mapping[str, Any], inputs: Mapping[str, Artifact]) -> str:
    """The key of what is asked for: its content, and its inputs as node name -> revision."""
    return digest({"stage": stage, "format": format_version, "content": content, "inputs": revisions(inputs)})


def revisions(inputs: Mapping[str, Artifact]) -> dict[str, str]:
    return {name: artifact.revision for name, artifact in inputs.items()}


def again_path(stage: str, key: str) -> str:
    """Where it lies that `key` is to be made again."""
    return f"{stage}/keys/{key}.again"


def find(store: Store, stage: str, key: str) -> Artifact | None:
    """The artifact that answers `key`, from its manifest alone.

    None if there is none, it was asked for again, or what says so is damaged: it is to be made. Raises `StorageError`
    if the store doesn't answer: then nobody knows.
    """
    if store.exists(again_path(stage, key)):
        return None
    try:
        answer = read_sealed(store, f"{stage}/keys/{key}.json", ANSWER)
        if answer["key"] != key:
            raise Damaged(f"{store.location(f'{stage}/keys/{key}.json')} is of {answer['key']}; {REMEDY}")
        artifact = load(store, stage, answer["revision"], key)
    except FileNotFoundError:
        return None
    except ArtifactError as error:
        logger.warning("%s is taken as not made: %s", stage, error)
        return None
    return answered(artifact, answer)


def answered(artifact: Artifact, answer: Mapping[str, Any]) -> Artifact:
    """The revision as this answer has it: with the settings, inputs and times of its own question."""
    return replace(artifact, manifest={**artifact.manifest, **{name: answer[name] for name in ("key", *OF_THE_ANSWER)}})


def load(store: Store, stage: str, revision: str, key: str = "") -> Artifact:
    """Raises `ArtifactError` if the revision's manifest is missing or damaged."""
    path = f"{stage}/revisions/{revision}/{MANIFEST}"
    try:
        manifest = read_sealed(store, path, OF_MANIFEST)
    except FileNotFoundError as error:
        raise ArtifactError(f"{store.location(path)} is missing; {REMEDY}") from error
    if manifest.get("revision") != revision:
        raise Damaged(f"{store.location(path)} is of revision {manifest.get('revision')}; {REMEDY}")
    return Artifact(stage, key or manifest["key"], revision, manifest, store)


def read_units(data: bytes) -> tuple[Unit, ...]:
    """The units that the table lists, in its order. Raises `Damaged` if it can't be read."""
    try:
        table = pq.ParquetFile(io.BytesIO(data), pre_buffer=False).read(["record"], use_threads=False)
        # Not with threads, which abort a process that ends (pyarrow 25, seen).
        return tuple(Unit.from_json(json.loads(record)) for record in table.column("record").to_pylist())
    except UNREADABLE as error:
        raise Damaged(f"a list of units can't be read ({error}); {REMEDY}") from error


def _is_table(data: bytes, manifest: Mapping[str, Any]) -> bool:
    return hashlib.sha256(data).hexdigest() == str(manifest["tables"][UNITS_TABLE])


def record_path(stage: str, unit_key: str) -> str:
    return f"{stage}/units/{unit_key}/record.json"


def read_record(store: Store, stage: str, unit_key: str) -> Unit:
    """The unit by its own record. Raises `FileNotFoundError`, `Damaged`."""
    path = record_path(stage, unit_key)
    record = read_sealed(store, path, {"stage": str, "key": str})
    if (record["stage"], record["key"]) != (stage, unit_key):
        raise Damaged(f"{store.location(path)} is of another unit; {REMEDY}")
    try:
        return Unit.from_json(record)
    except UNREADABLE as error:
        raise Damaged(f"{store.location(path)} is not what was written; {REMEDY}") from error


def find_unit(store: Store, stage: str, unit_key: str) -> Unit | None:
    """The published unit; None if there is none, or its record is damaged: it is to be made.

    Raises `StorageError` if the store doesn't answer: then nobody knows.
    """
    try:
        return read_record(store, stage, unit_key)
    except FileNotFoundError:
        return None
    except Damaged as error:
        logger.warning("unit %s of %s is taken as not made: %s", unit_key, stage, error)
        return None


def fetch_file(store: Store, unit: Unit, suffix: str) -> Path:
    """The unit's one file whose name ends with `suffix`, as a local one.

    Raises `FileNotFoundError`, `infra.storage.FileDamaged` if it is not what was recorded: see `Store.fetch`.
    """
    entry = unit.entry(suffix)
    return store.fetch(unit.path(entry.name), entry.size_bytes, entry.sha256)


def fetch_unit(store: Store, unit: Unit) -> Path:
    """The unit's folder as a local one: in the store itself if that is local, else in the node's cache.

    Raises `FileNotFoundError`, `infra.storage.FileDamaged` if a file is not what was recorded.
    """
    return store.fetch_folder(f"{unit.stage}/units/{unit.key}", unit.files)


def fetch_folder(store: Store, unit: Unit, name: str) -> Path:
    """The unit's files under the folder `name` ("unet"), as a local folder. Raises `ArtifactError` if it has none."""
    entries = tuple(entry for entry in unit.files if entry.name.startswith(f"{name}/"))
    if not entries:
        raise ArtifactError(
            f"unit {unit.stage}/{unit.key} has no folder {name!r}; it has {[e.name for e in unit.files]}"
        )
    return fetch_unit(store, replace(unit, files=entries)) / name
