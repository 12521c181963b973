"""A store: any fsspec URL, written so that a reader never sees half a file.

Publishes bytes and files, creates exclusively, brings files near. *What* is published, and where, is the caller's
matter; locks are in `infra.locks`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from infra.digests import RecordedFile, check
from infra.file_cache import FileCache, note_use
from infra.store_errors import FileDamaged, StorageError, StoreUnwritable, opening, reading, writing

__all__ = ["FileDamaged", "StorageError", "Store", "StoreUnwritable"]


class Store:
    """Files under one URL (`./ldm-store`, `s3://bucket/prefix`, any fsspec URL).

    Paths are relative to the URL, with forward slashes. A path is published once and then never edited, except for
    small pointers, which are replaced whole. Instances pickle by URL alone, so that workers on other machines open
    their own connection; credentials and endpoints come from the environment as the fsspec driver documents.
    """

    def __init__(self, url: str | Path) -> None:
        """Raises `StorageError` if there is no driver for `url`."""
        with opening(str(url)):
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
    # All of it raises `StorageError` if the store doesn't answer, or refuses.

    def exists(self, path: str) -> bool:
        with reading(self.location(path)):
            self._forget_listings()
            return bool(self._fs.exists(self._full(path)))

    def listdir(self, path: str) -> list[str]:
        """Sorted names directly under `path`; empty where nothing is there. Unfinished local writes are left out."""
        try:
            with reading(self.location(path)):
                self._forget_listings()
                found = self._fs.ls(self._full(path), detail=False)
        except FileNotFoundError:
            return []
        names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)
        return sorted(name for name in names if not name.endswith(".part"))

    def sizes(self, path: str) -> dict[str, int]:
        """Sizes in bytes of all files anywhere under the folder `path`, by their paths in it; from one listing.

        Empty where nothing is there. Unfinished local writes are left out.
        """
        with reading(self.location(path)):
            if self.is_local:
                found = dict(_local_sizes(self._full(path)))
            else:
                self._forget_listings()
                found = _remote_sizes(self._fs, self._full(path))
        return {name: size for name, size in sorted(found.items()) if not name.endswith(".part")}

    def read_bytes(self, path: str) -> bytes:
        """Raises `FileNotFoundError` if nothing is published at `path`, `FileDamaged` if no file can be read there."""
        with reading(self.location(path)):
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
        """A seekable binary file for reading. Raises `FileNotFoundError` if nothing is published at `path`."""
        with reading(self.location(path)):
            return cast(IO[bytes], self._fs.open(self._full(path), "rb"))

    def fetch(self, path: str, size_bytes: int | None = None, sha256: str | None = None) -> Path:
        """`path` as a local file: the file itself in a local store, else a copy in the node's cache.

        Open it soon: the cache (see `infra.file_cache`) is bounded, and drops what nobody has fetched for minutes.
        Meant for published files, which never change. `size_bytes` and `sha256` are what was recorded of the file: a
        copy is compared with both each time, and fetched anew if it differs; the file of a local store with its size.

        Raises `FileNotFoundError` if nothing is published at `path`, `FileDamaged` if it is not what was recorded.
        """
        location = self.location(path)
        with reading(location):
            if not self.is_local:
                cache = FileCache()
                local = cache.path(self._origin(), path)
                cache.fetch(
                    local, location, lambda to: self._fs.get_file(self._full(path), str(to)), size_bytes, sha256
                )
                return local
            local = Path(self._full(path))
            if not local.is_file():
                raise FileNotFoundError(str(local))
            check(local, location, size_bytes)
            return local

    def fetch_folder(self, path: str, files: Iterable[RecordedFile]) -> Path:
        """The folder `path` as a local one, with `files` in it, as `fetch` does it; all of them are there at its end.

        Raises `FileNotFoundError` if one is not published, `FileDamaged` if one is not what was recorded.
        """
        wanted = list(files)
        if self.is_local:
            for file in wanted:
                self.fetch(f"{path}/{file.name}", file.size_bytes)
            return Path(self._full(path))
        local = FileCache().path(self._origin(), path)
        missing = wanted
        while missing:
            for file in missing:
                self.fetch(f"{path}/{file.name}", file.size_bytes, file.sha256)
                # However long the last one takes, the first ones are in use, and must be there at the end.
                gone = [file for file in wanted if not note_use(local / file.name)]
            missing = gone
        return local

    # -- writing ---------------------------------------------------------------------------------------------------

    def publish_bytes(self, path: str, data: bytes) -> None:
        """Write `data` at `path`, all or nothing: readers see the old content or the new one.

        Raises `StorageError` (disk full, not writable, unreachable).
        """
        if not self.is_local:
            with writing(self.location(path)):
                self._fs.pipe_file(self._full(path), data)
            return
        with self._replacing(path) as part:
            part.write_bytes(data)

    def publish_file(self, path: str, local_file: Path) -> None:
        """Copy `local_file` to `path`, all or nothing. Raises `StorageError` as `publish_bytes` does."""
        if not self.is_local:
            with writing(self.location(path)):
                self._fs.put_file(str(local_file), self._full(path))
            return
        with self._replacing(path) as part:
            shutil.copyfile(local_file, part)

    def create(self, path: str, data: bytes) -> bool:
        """Write `data` at `path` unless something is there: True for exactly one of any number of callers."""
        full = self._full(path)
        with writing(self.location(path)):
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
        """Remove the file or folder at `path`, of a link the link alone; nothing there is no error."""
        full = self._full(path)
        with writing(self.location(path)), contextlib.suppress(FileNotFoundError):
            if self.is_local and Path(full).is_symlink():
                Path(full).unlink()
            else:
                self._fs.rm(full, recursive=True)

    def check_writable(self) -> None:
        """Raises `StorageError` if nothing can be written here: better known before hours of work than after."""
        probe = f".writable-{uuid.uuid4().hex}"
        self.publish_bytes(probe, b"")
        self.delete(probe)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _full(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _forget_listings(self) -> None:
        if not self.is_local:
            self._fs.invalidate_cache()

    def _origin(self) -> str:
        """Name of this store in the cache, apart from others: buckets at two addresses may have one name."""
        options = self._fs.storage_options
        given = options.get("endpoint_url") or options.get("client_kwargs", {}).get("endpoint_url")
        address = given or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        return f"{address} {self.url}"

    @contextlib.contextmanager
    def _replacing(self, path: str) -> Iterator[Path]:
        """A scratch file beside the target, which takes the target's name when the block ends well."""
        target = Path(self._full(path))
        part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
        with writing(self.location(path)):
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


def _local_sizes(folder: str) -> Iterator[tuple[str, int]]:
    for parent, _, names in os.walk(folder, onerror=_unless_gone):
        for name in names:
            file = Path(parent, name)
            try:
                size_bytes = file.stat().st_size
            except FileNotFoundError:  # deleted since
                continue
            except OSError as error:
                if error.errno != errno.ELOOP:  # a link that leads nowhere is no file
                    raise
            else:
                yield file.relative_to(folder).as_posix(), size_bytes


def _unless_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _remote_sizes(fs: Any, folder: str) -> dict[str, int]:
    start = folder.strip("/") + "/"
    found = {name.lstrip("/"): entry for name, entry in fs.find(folder, detail=True).items()}
    return {
        name.removeprefix(start): int(entry["size"])
        for name, entry in found.items()
        if name.startswith(start) and not name.endswith("/")  # that is an empty object in place of a folder
    }


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
