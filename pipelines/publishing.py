"""How units and revisions are written: files first, then the record or manifest that says they are there."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Store
from pipelines.artifacts import (
    FILES_TABLE,
    MANIFEST,
    OF_THE_ANSWER,
    UNITS_TABLE,
    ArtifactError,
    Counts,
    FileEntry,
    Unit,
    file_sha256,
    load,
    record_path,
    sealed,
)

SCHEMA_VERSION = 3
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


def listed(store: Store, stage: str, revision: str) -> set[str] | None:
    """Keys of the units that the revision lists; None unless it is published, and all of it is what was written."""
    try:
        artifact = load(store, stage, revision)
        files = store.read_bytes(f"{artifact.path}/{FILES_TABLE}")
        if hashlib.sha256(files).hexdigest() != artifact.manifest["tables"][FILES_TABLE]:
            return None
        return {unit.key for unit in artifact.units}
    except (ArtifactError, FileNotFoundError):
        return None


def iso(time_s: float) -> str:
    """ "2026-11-26T05:12:00Z"."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time_s))


@functools.cache
def package_versions() -> Mapping[str, str]:
    versions = {"python": platform.python_version()}
    for name in TRACKED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


@functools.cache
def git_revision() -> str | None:
    """Revision of the checkout that the code was loaded from; None where it runs from an installed wheel."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


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
