"""A folder of images: its files listed, hashed, and read as if they had been fetched.

A file is known as `folder:` and its percent-encoded path seen from the folder: no name of a machine, and nothing that
the web's fetcher would take. Nothing outside the folder is opened, whatever a list or a symbolic link says; of a file
system that isn't local, paths alone are checked.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import logging
import os
import posixpath
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote, unquote

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.acquire.errors import ShardFailed, SourceError
from pipelines.acquire.fetch import MAX_MESSAGE_CHARS, FetchResult
from pipelines.acquire.filter import too_many_bytes_message
from pipelines.acquire.sniff import HEAD_BYTES, sniff
from pipelines.dataset.ledger import ErrorClass, Outcome, Reason
from pipelines.recipe import Fetch

SCHEME = "folder:"
PATH_CHARACTERS = "/!$&'()*+,;=:@"
"""What a URL's path may hold as it is (RFC 3986, 3.3), beside letters, digits and -._~"""
WEB_PROTOCOLS = ("http://", "https://")
FOLDER_RULES = frozenset({"max_bytes", "max_pixels"})
"""The settings of `acquire.fetch` that apply to files."""
HASH_BYTES = 2**20
KNOWN_FILES = 2**18
"""Hashes remembered within a process."""

logger = logging.getLogger(__name__)

Version = tuple[Any, ...] | None
"""Differs when a file has changed, within one process; None where that can't be told."""


class OutsideFolder(Exception):
    """A path or a symbolic link leads out of the folder."""


class NotAFile(Exception):
    """A path leads to a folder, a pipe or a device."""


def folder_url(name: str) -> str:
    """ "folder:cats/red%20cat.png" for "cats/red cat.png"; any name that a file system allows has one of its own."""
    return SCHEME + quote(name, safe=PATH_CHARACTERS, errors="surrogateescape")


class Folder:
    """A folder at a local path or an fsspec URL. Raises `SourceError` if it isn't there, or lies on the web."""

    def __init__(self, path: str) -> None:
        self.path = path
        if any(part.startswith(WEB_PROTOCOLS) for part in path.split("::")):
            raise SourceError(f"source.path: {path} is on the web; list the URLs of its images, with source.kind=urls")
        try:
            self._fs, root = fsspec.core.url_to_fs(path)
            self._fs.invalidate_cache()
            found = self._fs.isdir(root)
        except (OSError, ValueError, ImportError) as error:
            raise SourceError(f"source.path: {path} can't be reached: {error}") from error
        if not found:
            raise SourceError(f"source.path: no folder {path!r}; give a folder of images that exists")
        self._is_local = isinstance(self._fs, LocalFileSystem)
        self._root = os.path.realpath(root) if self._is_local else root.rstrip("/")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and (self._fs, self._root) == (other._fs, other._root)

    def __hash__(self) -> int:
        return hash((self._fs, self._root))

    @property
    def location(self) -> str:
        """The path as processes with another working folder understand it."""
        return self._root if self._is_local else self.path

    def files(self, recursive: bool) -> dict[str, Version]:
        """All files but hidden ones, by their path seen from the folder ("cats/1.png"), sorted. Raises `SourceError`.

        Links to folders are not followed.
        """
        try:
            found = self._local_files(recursive) if self._is_local else self._remote_files(recursive)
        except OSError as error:
            raise SourceError(f"source.path: {self.path} can't be listed: {error}") from error
        return {name: found[name] for name in sorted(found)}

    def open(self, name: str) -> BinaryIO:
        """Raises `OutsideFolder`, `NotAFile`, `FileNotFoundError`, any other `OSError`."""
        if posixpath.isabs(name) or ".." in name.split("/"):
            raise OutsideFolder(f"{name!r} leads out of the folder; name files as they are seen from it")
        if not name or "\0" in name:
            raise FileNotFoundError(f"{name!r} is no name of a file")
        if self._is_local:
            return self._opened_locally(name)
        return cast("BinaryIO", self._fs.open(f"{self._root}/{name}", "rb"))

    def sha256(self, name: str, version: Version) -> str | None:
        """The hash of a file's bytes; None if it can't be read, as its row will say.

        The content is in the shards' keys, as size and time of change differ between two copies of one folder, and may
        be the same for files that are not. To hash is little beside decoding, and within a process it is done once, as
        long as inode, size and times (those the kernel keeps as well) are the same, or an object store's ETag.
        """
        try:
            return _sha256(self, name, version) if version else _sha256.__wrapped__(self, name, version)
        except (OSError, OutsideFolder, NotAFile):
            return None

    def _opened_locally(self, name: str) -> BinaryIO:
        """By its real path, without waiting for the other end of a pipe."""
        path = os.path.realpath(f"{self._root}/{name}")
        if os.path.commonpath([path, self._root]) != self._root:
            raise OutsideFolder(f"{name!r} is a symbolic link out of the folder; copy the file into it")
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise NotAFile(f"{name!r} is a folder, a pipe or a device")
        return os.fdopen(descriptor, "rb")

    def _local_files(self, recursive: bool) -> dict[str, Version]:
        found: dict[str, Version] = {}
        for folder, subfolders, names in os.walk(self._root, onerror=_raise):
            subfolders[:] = [name for name in subfolders if recursive and not name.startswith(".")]
            for path in (Path(folder, name) for name in subfolders):
                if path.is_symlink():
                    logger.warning("%s is a symbolic link to a folder: what is in it is not looked at", path)
            for path in (Path(folder, name) for name in names if not name.startswith(".")):
                found[path.relative_to(self._root).as_posix()] = _local_version(path)
        return found

    def _remote_files(self, recursive: bool) -> dict[str, Version]:
        found: dict[str, Version] = {}
        for path, info in self._fs.find(self._root, maxdepth=None if recursive else 1, detail=True).items():
            name = path.removeprefix(self._root).lstrip("/")
            if name and not any(part.startswith(".") for part in name.split("/")):
                tag = next((info[key] for key in ("ETag", "etag", "md5Hash") if info.get(key)), None)
                found[name] = (tag, info.get("size")) if tag else None
        return found


def _raise(error: OSError) -> None:
    raise error


def _local_version(path: Path) -> Version:
    try:
        seen = path.stat()
    except OSError:
        return None
    return (seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


@functools.lru_cache(KNOWN_FILES)
def _sha256(folder: Folder, name: str, version: Version) -> str:  # noqa: ARG001 - it is the cache's
    hasher = hashlib.sha256()
    with folder.open(name) as stream:
        while chunk := stream.read(HASH_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


class FolderReader:
    """Takes the web fetcher's place: `folder:` names to bytes. Safe to use from many threads.

    `hashes` are the files' sha256 by such names, as they were when the shard's key was made.
    """

    def __init__(self, folder: Folder, hashes: Mapping[str, str | None], rules: Fetch) -> None:
        self._folder = folder
        self._hashes = hashes
        self._max_bytes = rules.max_bytes
        self._changed: list[str] = []

    def fetch(self, url: str) -> FetchResult:
        """Never raises for what a file is or a list says."""
        now = datetime.datetime.now(datetime.UTC)
        try:
            body = self._read(unquote(url.removeprefix(SCHEME), errors="surrogateescape"))
        except (OSError, OutsideFolder, NotAFile) as error:
            self._compare(url, None)
            message = getattr(error, "strerror", None) or str(error)  # without the path: it is this machine's
            return _refused(_reason(error), message, now)
        if len(body) > self._max_bytes:
            return _refused(Reason.TOO_MANY_BYTES, too_many_bytes_message(self._max_bytes), now)
        self._compare(url, hashlib.sha256(body).hexdigest())
        mime = sniff(body[:HEAD_BYTES])
        if mime is None:
            refused = _refused(Reason.NOT_AN_IMAGE, f"begins with {body[:16]!r}, as no image does", now)
            return replace(refused, size_bytes=len(body))
        return FetchResult(body, len(body), mime, attempts=1, fetched_at=now)

    def check_unchanged(self) -> None:
        """Raises `ShardFailed` if a file wasn't what the shard's key says; to be called at the end."""
        if self._changed:
            raise ShardFailed(
                f"{len(self._changed)} files of the folder changed while they were read, such as {self._changed[0]}"
            )

    def _read(self, name: str) -> bytes:
        with self._folder.open(name) as stream:
            return stream.read(self._max_bytes + 1)

    def _compare(self, url: str, sha256: str | None) -> None:
        if self._hashes[url] != sha256:
            self._changed.append(url)


def _reason(error: Exception) -> Reason:
    if isinstance(error, OutsideFolder):
        return Reason.OUTSIDE_FOLDER
    if isinstance(error, NotAFile):
        return Reason.NOT_AN_IMAGE
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return Reason.NOT_FOUND
    return Reason.FORBIDDEN if isinstance(error, PermissionError) else Reason.UNREADABLE


def _refused(reason: Reason, message: str, now: datetime.datetime) -> FetchResult:
    """All are permanent: a file that is read one day has another hash, and so its shard another key."""
    error_class = ErrorClass.PERMANENT if reason.outcome is Outcome.FAILED else None
    return FetchResult(
        reason=reason, message=message[:MAX_MESSAGE_CHARS], error_class=error_class, attempts=1, fetched_at=now
    )
