"""The node's cache of remote files: bounded, shared by its processes, checked, and its user's alone.

It lies in `$LATENTWORKS_CACHE`, or in a folder of this user's under the system's temporary one. It holds at most
`$LATENTWORKS_CACHE_GB` (10⁹ bytes each); without that, 50 or a tenth of the disk's free space, whichever is less. Files
that weren't used for longest go first, after each download; one that was used in the last five minutes stays, so that
whoever was given its path can open it, and the cache may be larger for as long. A file that is open, or mapped into
memory, can still be read after it went; its space is free once the last process has closed it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from infra.digests import check
from infra.store_errors import FileDamaged, StorageError

FOLDER_VARIABLE = "LATENTWORKS_CACHE"
SIZE_VARIABLE = "LATENTWORKS_CACHE_GB"
DEFAULT_BYTES = 50 * 10**9
SHARE_OF_FREE_SPACE = 10
IN_USE_S = 300.0

logger = logging.getLogger(__name__)


class FileCache:
    """Copies of remote files in the folder `root`.

    A file is downloaded by one process, while others that want it wait. Files with the same `origin` mirror its paths,
    so that the files of one folder stay together.
    """

    def __init__(self) -> None:
        """Raises `StorageError` if the folder can't be made, isn't this user's, or the bound is no number."""
        self._max_bytes = _max_bytes()
        self.root = _private_folder()

    def path(self, origin: str, path: str) -> Path:
        """Where the copy of `path` is, or would be."""
        return self.root / "files" / _digest(origin) / path

    def fetch(
        self, local: Path, location: str, download: Callable[[Path], None], size_bytes: int | None, sha256: str | None
    ) -> None:
        """Has a copy of `location` at `local`, a `path`, with `size_bytes` and `sha256`, where they are given.

        One that has others, as after a bit flipped, is made anew by `download(to)`, like one that is not there.

        Raises `FileDamaged` if what was downloaded is different; what `download` raises.
        """
        name = _digest(str(local))
        sound = _is_recorded(local, size_bytes, sha256)  # before the lock: all who want it may compare at once
        with self._lock(name, wanted=location):
            fresh = not (sound and local.is_file()) and not _is_recorded(local, size_bytes, sha256)
            if fresh:
                part = self.root / "incoming" / name
                try:
                    download(part)
                    check(part, location, size_bytes, sha256)
                    _move(part, local)
                finally:
                    part.unlink(missing_ok=True)
            note_use(local)
        if fresh:
            self._make_room()

    def _make_room(self) -> None:
        """Delete the files that weren't used for longest until the rest fits; by one process at a time."""
        with contextlib.suppress(BlockingIOError), self._lock("making-room"):
            self._delete_abandoned()
            files = sorted(_files_by_use(self.root / "files"))
            total = sum(size for _, size, _ in files)
            free = shutil.disk_usage(self.root).free
            default = min(DEFAULT_BYTES, (free + total) // SHARE_OF_FREE_SPACE)
            bound = default if self._max_bytes is None else self._max_bytes
            in_use_ns = time.time_ns() - int(IN_USE_S * 1e9)
            for used_ns, size, path in files:
                if total <= bound or used_ns > in_use_ns:
                    break
                if self._delete(path, used_ns):
                    total -= size
            if total > bound:
                logger.info("the cache %s holds %d bytes, over its %d, all in use", self.root, total, bound)

    def _delete(self, path: Path, used_ns: int) -> bool:
        """Delete a file unless it is being fetched, or was used since."""
        with contextlib.suppress(BlockingIOError, FileNotFoundError), self._lock(_digest(str(path))):
            if path.stat().st_atime_ns == used_ns:
                path.unlink()
                with contextlib.suppress(OSError):  # not empty
                    path.parent.rmdir()
                return True
        return False

    def _delete_abandoned(self) -> None:
        """Delete what processes that were killed had downloaded so far."""
        for part in (self.root / "incoming").iterdir():
            with contextlib.suppress(BlockingIOError), self._lock(part.name):
                part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _lock(self, name: str, wanted: str | None = None) -> Iterator[None]:
        """Holds the lock `name`, which dies with its holder; waits for it where somebody wants the file `wanted`.

        Raises `BlockingIOError` if it is taken and nothing is `wanted`.
        """
        path = self.root / "locks" / name
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                _flock(descriptor, wanted)
                if not _is_at(descriptor, path):
                    continue  # its former holder has removed it: it excludes nobody
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
            finally:
                os.close(descriptor)


def note_use(local: Path) -> bool:
    """Note that the copy at `local` is used now; False if it is gone."""
    try:
        os.utime(local, ns=(time.time_ns(), local.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _is_recorded(local: Path, size_bytes: int | None, sha256: str | None) -> bool:
    with contextlib.suppress(OSError, FileDamaged):
        if local.is_file():
            check(local, str(local), size_bytes, sha256)
            return True
    return False


def _move(part: Path, local: Path) -> None:
    while True:
        local.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the folder was empty, and somebody who made room removed it
            part.replace(local)
            return


def _files_by_use(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """When each file was used last, its size and its path."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                yield status.st_atime_ns, status.st_size, path


def _flock(descriptor: int, wanted: str | None) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if wanted is None:
            raise
        logger.info("waiting for another process, which fetches %s", wanted)
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _max_bytes() -> int | None:
    given = os.environ.get(SIZE_VARIABLE)
    if not given:
        return None
    try:
        max_bytes = int(float(given) * 10**9)
    except (ValueError, OverflowError):
        max_bytes = -1
    if max_bytes < 0:
        raise StorageError(f"{SIZE_VARIABLE} is {given!r}; give the cache's size in GB, a number of 0 or more")
    return max_bytes


def _private_folder() -> Path:
    """The cache's folder, with what lies in it made.

    A folder that an operator named is taken as it is. In the temporary one, which all users share, it must be a real
    folder of this user's, and is closed to all others.
    """
    named = os.environ.get(FOLDER_VARIABLE)
    root = Path(named or Path(tempfile.gettempdir()) / f"latentworks-cache-{os.getuid()}").absolute()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.lstat()
        if not named and (status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode)):
            raise StorageError(
                f"the cache {root} belongs to user {status.st_uid}, or is no folder, and must be a folder of user"
                f" {os.getuid()}; remove it, or name a folder of your own with {FOLDER_VARIABLE}"
            )
        if not named:
            root.chmod(0o700)
        for name in ("files", "incoming", "locks"):
            (root / name).mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"the cache {root} can't be used: {error.strerror or error}; make room or give leave, or name another"
            f" folder with {FOLDER_VARIABLE}"
        ) from error
    return root


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
