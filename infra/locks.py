"""One writer at a time: a named lock in a store, which dies with its holder.

In a local store the kernel holds it (`flock`), so that it is free the moment its process is gone, however it went.
In an object store it is a row of generations, each created exclusively: the highest one is the holder, shows a
heartbeat while it lives, and is succeeded, once it is released or silent, by whoever creates the next generation.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from infra.storage import StorageError, Store

HEARTBEAT_S = 10.0
SILENT_AFTER_S = 60.0

logger = logging.getLogger(__name__)


class Locked(Exception):
    """Another run holds the lock; the message names it."""


@contextlib.contextmanager
def lock(store: Store, name: str, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock `name` of `store` for the length of the block, waiting up to `wait_s` for it.

    Raises:
        Locked: another run held it all that time; the message names the owner (user, host, process, since when).
    """
    deadline_s = time.monotonic() + wait_s
    path = f"locks/{name}"
    hold = _hold_local if store.is_local else _hold_remote
    while True:
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(hold(store, path))
                deadline_s = float("-inf")  # from here on, an error is the block's own
                yield
            return
        except Locked:
            if time.monotonic() >= deadline_s:
                raise
        time.sleep(min(1.0, max(0.05, deadline_s - time.monotonic())))


def check_free(store: Store, name: str) -> None:
    """Raises `Locked`, which names the owner, if another run holds the lock `name` at the moment.

    To say so early, before much is started: it may be taken the next moment all the same.
    """
    path = f"locks/{name}"
    if not store.is_local:
        _check_succession(store, path, _generations(store, path))
        return
    file = Path(store.location(path))
    with contextlib.suppress(FileNotFoundError), file.open("rb") as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked(path, store, _parsed(file.read_bytes())) from None


def _owner() -> dict[str, str | int]:
    return {"user": getpass.getuser(), "host": socket.gethostname(), "pid": os.getpid(), "since_s": int(time.time())}


def _locked(path: str, store: Store, owner: dict[str, str | int]) -> Locked:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(int(owner.get("since_s", 0))))
    return Locked(
        f"another run is writing {store.location(path.removeprefix('locks/'))}: {owner.get('user')}@{owner.get('host')}"
        f", process {owner.get('pid')}, since {since}; wait for it, or end it, then run the same command again"
    )


@contextlib.contextmanager
def _hold_local(store: Store, path: str) -> Iterator[None]:
    file = Path(store.location(path))
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)  # not inherited by child processes
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _locked(path, store, _parsed(file.read_bytes())) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_owner()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _hold_remote(store: Store, path: str) -> Iterator[None]:
    generations = _generations(store, path)
    latest = max(generations, default=0)
    _check_succession(store, path, generations)
    mine = f"{path}/{latest + 1:012d}"
    owner = _owner()
    if not store.create(mine, _beat(owner)):
        raise _locked(path, store, _parsed(store.read_bytes(mine)))
    for old in generations:
        store.delete(f"{path}/{old:012d}")
    stopped = threading.Event()

    def beat() -> None:
        while not stopped.wait(HEARTBEAT_S):
            try:
                store.publish_bytes(mine, _beat(owner))
            except StorageError as error:  # the store may come back before the others call us silent
                logger.warning("no heartbeat for %s: %s", path, error)

    thread = threading.Thread(target=beat, daemon=True, name=f"heartbeat of {path}")
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        store.publish_bytes(mine, _beat(owner | {"released": 1}))


def _generations(store: Store, path: str) -> list[int]:
    return [int(entry) for entry in store.listdir(path) if entry.isdigit()]


def _check_succession(store: Store, path: str, generations: list[int]) -> None:
    """Raises `Locked` if the highest generation is held by somebody who lives."""
    if not generations:
        return
    holder = _parsed(store.read_bytes(f"{path}/{max(generations):012d}"))
    if not holder.get("released") and time.time() - float(holder.get("beat_s", 0)) < SILENT_AFTER_S:
        raise _locked(path, store, holder)


def _beat(owner: dict[str, str | int]) -> bytes:
    return json.dumps(owner | {"beat_s": int(time.time())}).encode()


def _parsed(data: bytes) -> dict[str, str | int]:
    try:
        return dict(json.loads(data))
    except ValueError:
        return {}  # its holder is between creating the file and naming itself
