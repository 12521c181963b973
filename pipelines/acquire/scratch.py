"""A temporary folder for the length of a shard, which doesn't outlive its process for long.

A worker that is killed can't remove its folder; the next one on that machine does. The folder's lock is held by its
owner, and the kernel frees it when the owner is gone: a folder whose lock is free belongs to nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "latentworks-acquire-"
ABANDONED_AFTER_S = 60.0
"""Younger folders are left alone: their owner may be about to take the lock."""


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A private folder, removed at the end; also removes those of killed processes.

    A thread that was left behind may still write into it: that is no error of whoever leaves.
    """
    parent = Path(tempfile.gettempdir())
    _remove_abandoned(parent)
    folders = tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True)
    with folders as folder, (Path(folder) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Path(folder)


def _remove_abandoned(parent: Path) -> None:
    for lock_path in parent.glob(f"{PREFIX}*/lock"):
        with contextlib.suppress(OSError), lock_path.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - lock_path.stat().st_mtime > ABANDONED_AFTER_S:
                shutil.rmtree(lock_path.parent, ignore_errors=True)
