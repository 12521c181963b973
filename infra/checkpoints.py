"""Checkpoints in a store: a folder per step, complete when its manifest is there, verified before anything is read.

What the files mean is the engine's matter. Under `<prefix>/<step>/` lie the files and, written last, `manifest.json`
with size and sha256 of each; where a file proved to be damaged, `damaged.json` has what was in the manifest. Ranks on
several nodes each call `upload_files` with what they wrote, then one of them `publish_manifest` with everyone's
digests; where all files are on one node, `publish_checkpoint` does both.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from infra.digests import check, sha256_of
from infra.storage import FileDamaged, Store

log = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
SET_ASIDE_NAME = "damaged.json"
MANIFEST_FORMAT = 1


class CheckpointError(Exception):
    """A checkpoint can't be published or used; the message names it."""


class CheckpointCorrupt(CheckpointError):
    """A file of a published checkpoint is missing or is not what was written; an earlier checkpoint may be sound."""


@dataclass(frozen=True)
class FileDigest:
    """A file of a checkpoint, and what it must be."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointRef:
    """A complete checkpoint, as its manifest describes it. Its files are not verified yet."""

    path: str
    """The checkpoint's folder in the store."""
    step: int
    info: dict[str, Any]
    """What the publisher wanted known without opening the files."""
    files: tuple[FileDigest, ...]


def upload_files(store: Store, prefix: str, local_folder: Path, step: int, names: Iterable[str]) -> list[FileDigest]:
    """Copy the files `names` of `local_folder` to where the checkpoint of `step` will be, and say what they are.

    An older checkpoint of the same step stops being complete here. Raises `StorageError`.
    """
    path = _path(prefix, step)
    for earlier in (MANIFEST_NAME, SET_ASIDE_NAME):
        store.delete(f"{path}/{earlier}")
    digests = []
    for name in sorted(names):
        digests.append(_digest(name, local_folder / name))
        store.publish_file(f"{path}/{name}", local_folder / name)
    return digests


def publish_manifest(
    store: Store, prefix: str, step: int, files: Iterable[FileDigest], info: Mapping[str, Any]
) -> CheckpointRef:
    """Make the checkpoint of `step` complete. Call when all of `files` are uploaded; `info` must be JSON.

    Raises `CheckpointError` if a name comes twice or no file is given, `StorageError` if the store fails.
    """
    ref = CheckpointRef(_path(prefix, step), step, dict(info), tuple(sorted(files, key=lambda file: file.name)))
    names = [file.name for file in ref.files]
    if not names or len(set(names)) < len(names):
        raise CheckpointError(f"checkpoint {ref.path}: need at least one file and each name once, got {names}")
    manifest = {
        "format": MANIFEST_FORMAT,
        "step": step,
        "info": ref.info,
        "files": [asdict(file) for file in ref.files],
    }
    store.publish_bytes(f"{ref.path}/{MANIFEST_NAME}", json.dumps(manifest, indent=1).encode())
    return ref


def publish_checkpoint(
    store: Store, prefix: str, local_folder: Path, step: int, info: Mapping[str, Any]
) -> CheckpointRef:
    """Publish all files of `local_folder` as the checkpoint of `step`."""
    names = [file.name for file in local_folder.iterdir() if file.is_file()]
    return publish_manifest(store, prefix, step, upload_files(store, prefix, local_folder, step, names), info)


def complete_checkpoints(store: Store, prefix: str) -> list[CheckpointRef]:
    """All complete checkpoints, the newest first. Others are left out, with a line in the log."""
    refs = (_read_manifest(store, f"{prefix}/{name}") for name in _step_names(store, prefix))
    return [ref for ref in refs if ref is not None]


def manifest_sha256(store: Store, ref: CheckpointRef) -> str:
    """Hash of the checkpoint's manifest, which has those of all its files. Raises `FileNotFoundError`."""
    return hashlib.sha256(store.read_bytes(f"{ref.path}/{MANIFEST_NAME}")).hexdigest()


def newest_sound_checkpoint(store: Store, prefix: str) -> CheckpointRef | None:
    """The newest checkpoint whose files are all what was written, each compared with its digest, if there is one.

    A newer one that proves to be damaged is set aside: it is complete no longer, so that it isn't kept in a sound
    one's stead. Call it from one process.
    """
    sizes = store.sizes(prefix)
    for ref in complete_checkpoints(store, prefix):
        try:
            _check_sizes(store, ref, prefix, sizes)
            fetch_checkpoint(store, ref)
        except CheckpointCorrupt as error:
            log.warning("checkpoint %s is set aside: %s", store.location(ref.path), error)
            manifest = store.read_bytes(f"{ref.path}/{MANIFEST_NAME}")
            store.publish_bytes(f"{ref.path}/{SET_ASIDE_NAME}", manifest)
            store.delete(f"{ref.path}/{MANIFEST_NAME}")
        else:
            return ref
    return None


def fetch_checkpoint(store: Store, ref: CheckpointRef) -> Path:
    """The local folder with the files of `ref`, each compared with its digest.

    Raises `CheckpointCorrupt` with the name of the first file that is missing or different.
    """
    try:
        for file in ref.files:
            path = f"{ref.path}/{file.name}"
            local = store.fetch(path, file.size_bytes, file.sha256)
            if store.is_local:
                check(local, store.location(path), file.size_bytes, file.sha256)
        return store.fetch_folder(ref.path, ref.files)
    except FileNotFoundError as error:
        raise CheckpointCorrupt(f"{store.location(path)} is in the manifest but not in the store") from error
    except FileDamaged as error:
        raise CheckpointCorrupt(str(error)) from error


def prune_checkpoints(store: Store, prefix: str, keep: int = 2) -> list[str]:
    """Delete what is older than the newest sound checkpoint, but for the newest `keep` sound ones.

    Sound is here a complete one with all its files, each of the size that was written; what has proved to be damaged
    is complete no longer (see `newest_sound_checkpoint`). Where none is sound, nothing is deleted. Returns the folders
    deleted. Call where nobody else publishes under `prefix` at the same time.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, not {keep}")
    sizes = store.sizes(prefix)
    sound = []
    for ref in complete_checkpoints(store, prefix):
        try:
            _check_sizes(store, ref, prefix, sizes)
        except CheckpointCorrupt as error:
            log.warning("checkpoint %s does not count as kept: %s", store.location(ref.path), error)
        else:
            sound.append(ref)
    kept = {ref.path for ref in sound[:keep]}
    deleted = []
    for name in reversed(_step_names(store, prefix)):
        path = f"{prefix}/{name}"
        if sound and path not in kept and int(name) < sound[0].step:
            store.delete(f"{path}/{MANIFEST_NAME}")  # first, so that half a deletion leaves nothing that looks complete
            store.delete(path)
            deleted.append(path)
    return deleted


def _step_names(store: Store, prefix: str) -> list[str]:
    """Names of the folders of steps, the newest first."""
    return sorted((name for name in store.listdir(prefix) if name.isdecimal()), reverse=True)


def _check_sizes(store: Store, ref: CheckpointRef, prefix: str, sizes: Mapping[str, int]) -> None:
    """Raises `CheckpointCorrupt` if a file is missing, or has another size, in the `sizes` of all under `prefix`."""
    folder = ref.path.removeprefix(f"{prefix}/")
    for file in ref.files:
        found = sizes.get(f"{folder}/{file.name}")
        if found != file.size_bytes:
            raise CheckpointCorrupt(
                f"{store.location(ref.path)}/{file.name} "
                + ("is missing" if found is None else f"has {found} bytes, but was written with {file.size_bytes}")
            )


def _path(prefix: str, step: int) -> str:
    return f"{prefix}/{step:09d}"


def _digest(name: str, path: Path) -> FileDigest:
    return FileDigest(name, path.stat().st_size, sha256_of(path))


def _read_manifest(store: Store, path: str) -> CheckpointRef | None:
    try:
        manifest = json.loads(store.read_bytes(f"{path}/{MANIFEST_NAME}"))
        files = tuple(FileDigest(**file) for file in manifest["files"])
        known = manifest["format"] == MANIFEST_FORMAT
        ref = CheckpointRef(path, int(manifest["step"]), dict(manifest["info"]), files)
    except (FileNotFoundError, NotADirectoryError):
        log.warning("checkpoint %s is incomplete (no manifest) and is ignored", store.location(path))
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("checkpoint %s has a manifest that can't be read (%r) and is ignored", store.location(path), error)
        return None
    if not known:
        log.warning("checkpoint %s has format %s and is ignored", store.location(path), manifest["format"])
        return None
    return ref
