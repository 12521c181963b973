"""A store: any fsspec URL, written so that a reader never sees half a file.

Publishes bytes and files, creates exclusively, brings files near. *What* is published, and where, is the caller's
matter; locks are in `infra.locks`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import IO, Any, cast

import fsspec

CACHE_ENVIRONMENT_VARIABLE = "LATENTWORKS_CACHE"
PERMANENT_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENOENT,
}


class StorageError(Exception):
    """A store can't be read or written; the message names the store, the path, the cause and what to do."""


class StoreUnwritable(StorageError):
    """It can't be written until somebody makes room or gives leave: trying again would meet the same."""


class Store:
    """Files under one URL (`./ldm-store`, `s3://bucket/prefix`, any fsspec URL).

    Paths are relative to the URL, with forward slashes. A path is published once and then never edited, except for
    small pointers, which are replaced whole. Instances pickle by URL alone, so that workers on other machines open
    their own connection; credentials and endpoints come from the environment as the fsspec driver documents.
    """

    def __init__(self, url: str | Path) -> None:
        self._fs, root = fsspec.core.url_to_fs(str(url))
        self.is_local = "file" in _protocols(self._fs)
        self.root = str(Path(root).resolve()) if self.is_local else root.rstrip("/")
        self.url = self.root if self.is_local else f"{_protocols(self._fs)[0]}://{self.root}"

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def location(self, path: str) -> str:
        """The full path or URL of `path`, to show to people and to give to other programs."""
        return f"{self.url}/{path}" if path else self.url

    # -- reading ---------------------------------------------------------------------------------------------------

    def exists(self, path: str) -> bool:
        if not self.is_local:
            self._fs.invalidate_cache()
        return bool(self._fs.exists(self._full(path)))

    def listdir(self, path: str) -> list[str]:
        """Sorted names directly under `path`; empty where nothing is there. Unfinished local writes are left out."""
        if not self.is_local:
            self._fs.invalidate_cache()
        try:
            found = self._fs.ls(self._full(path), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)
        return sorted(name for name in names if not name.endswith(".part"))

    def read_bytes(self, path: str) -> bytes:
        """Raises `FileNotFoundError` if nothing is published at `path`."""
        return cast(bytes, self._fs.cat_file(self._full(path)))

    def read_json(self, path: str) -> Any:
        """Raises `FileNotFoundError`; `StorageError` if the file is not JSON."""
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise StorageError(
                f"{self.location(path)} is not valid JSON ({error}); it was damaged or edited"
            ) from error

    def open(self, path: str) -> IO[bytes]:
        """A seekable binary file for reading."""
        return cast(IO[bytes], self._fs.open(self._full(path), "rb"))

    def fetch(self, path: str) -> Path:
        """`path` as a local file: the file itself in a local store, else a copy in the node's cache.

        The cache is `$LATENTWORKS_CACHE`, or a folder under the system's temporary one, and mirrors the store's
        paths, so that the files of one folder stay together. Meant for published files, which never change: a cached
        copy is not compared with its source.
        """
        if self.is_local:
            local = Path(self._full(path))
            if not local.is_file():
                raise FileNotFoundError(str(local))
            return local
        cache = Path(os.environ.get(CACHE_ENVIRONMENT_VARIABLE) or Path(tempfile.gettempdir()) / "latentworks-cache")
        local = cache / hashlib.sha256(self.url.encode()).hexdigest()[:32] / path
        if not local.exists():
            local.parent.mkdir(parents=True, exist_ok=True)
            part = local.with_name(f".{local.name}.{uuid.uuid4().hex}.part")
            self._fs.get_file(self._full(path), str(part))
            part.replace(local)
        return local

    # -- writing ---------------------------------------------------------------------------------------------------

    def publish_bytes(self, path: str, data: bytes) -> None:
        """Write `data` at `path`, all or nothing: readers see the old content or the new one.

        Raises `StorageError` (disk full, not writable, unreachable).
        """
        if not self.is_local:
            with self._explained(path):
                self._fs.pipe_file(self._full(path), data)
            return
        with self._replacing(path) as part:
            part.write_bytes(data)

    def publish_file(self, path: str, local_file: Path) -> None:
        """Copy `local_file` to `path`, all or nothing. Raises `StorageError` as `publish_bytes` does."""
        if not self.is_local:
            with self._explained(path):
                self._fs.put_file(str(local_file), self._full(path))
            return
        with self._replacing(path) as part:
            shutil.copyfile(local_file, part)

    def create(self, path: str, data: bytes) -> bool:
        """Write `data` at `path` unless something is there: True for exactly one of any number of callers."""
        full = self._full(path)
        with self._explained(path):
            if not self.is_local:
                try:
                    self._fs.pipe_file(full, data, mode="create")
                except (FileExistsError, OSError) as error:
                    if isinstance(error, FileExistsError) or "PreconditionFailed" in repr(error.__cause__ or error):
                        return False
                    raise
                return True
            target = Path(full)
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
            part.write_bytes(data)
            try:
                os.link(part, target)  # fails if the name is taken; the content is there when the name is
            except FileExistsError:
                return False
            finally:
                part.unlink()
            return True

    def delete(self, path: str) -> None:
        """Remove the file or folder at `path`; nothing there is no error."""
        with self._explained(path), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._full(path), recursive=True)

    def check_writable(self) -> None:
        """Raises `StorageError` if nothing can be written here: better known before hours of work than after."""
        probe = f".writable-{uuid.uuid4().hex}"
        self.publish_bytes(probe, b"")
        self.delete(probe)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    @contextlib.contextmanager
    def _explained(self, path: str) -> Any:
        try:
            yield
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None)
            kind = StoreUnwritable if number in PERMANENT_ERRNOS else StorageError
            cause = getattr(error, "strerror", None) or error
            raise kind(
                f"can't write {self.location(path)}: {cause}; check that the store exists, has room and may be written"
                " (recipe key `store`), then run the same command again"
            ) from error

    @contextlib.contextmanager
    def _replacing(self, path: str) -> Any:
        """A scratch file beside the target, which takes the target's name when the block ends well."""
        target = Path(self._full(path))
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        with self._explained(path):
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                yield part
                _fsync(part)
                part.replace(target)
                _fsync(target.parent)
            finally:
                part.unlink(missing_ok=True)


def _protocols(fs: Any) -> tuple[str, ...]:
    protocol = fs.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
