"""What a local Ray cluster's processes are started with: settings, token, a private folder, and no process too many.

Ray is given; much is done by its private names, for want of public ones in Ray 2.60.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TEMP_PREFIX = "ldm-ray-"
# Ray puts <temp>/r/session_<26 characters>_<pid>/sockets/plasma_store in a Unix socket address of at most 107 bytes.
MAX_TEMP_PATH_BYTES = 107 - 72
STALE_AFTER_S = 60.0


@contextlib.contextmanager
def local_settings(ray: Any, token_path: Path) -> Iterator[None]:
    """What a local cluster's processes inherit, and this process's Ray with them, while the block runs."""
    constants = ray._private.ray_constants
    before = (constants.ENABLE_RAY_CLUSTER, {name: os.environ.get(name) for name in _local_environment(token_path)})
    # Ray read this one when it was imported.
    constants.ENABLE_RAY_CLUSTER = False
    _set_environment(_local_environment(token_path))
    _reread_environment()
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before[0]
        _set_environment(before[1])
        _reread_environment()


def _local_environment(token_path: Path) -> dict[str, str | None]:
    """Values of environment variables; None removes one."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_AUTH_TOKEN": None,
        "RAY_ADDRESS": None,
        "RAY_USAGE_STATS_ENABLED": "0",
        # "A cluster of one machine": Ray then takes 127.0.0.1 for the node's address, and all its servers listen
        # there. Without it, it replaces a given loopback address by the machine's own, and some of them listen on
        # every interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _reread_environment() -> None:
    """Makes Ray see the settings of `_local_environment`, which it keeps from its first use on.

    Private names, for want of public ones in Ray 2.60; the tests see it if they change.
    """
    raylet = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def temp_folder() -> Iterator[Path]:
    """A private folder for Ray's sockets and session files, removed at the end; also removes those of killed drivers.

    The folder's lock is held by its driver: one that is free belongs to nobody.
    """
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) + len(TEMP_PREFIX) + 9 > MAX_TEMP_PATH_BYTES:
        parent = Path("/tmp")  # Unix socket addresses are short, whatever TMPDIR says
    _remove_stale(parent)
    folder = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=parent))
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    for lock_path in parent.glob(f"{TEMP_PREFIX}*/lock"):
        with contextlib.suppress(OSError), lock_path.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - lock_path.stat().st_mtime > STALE_AFTER_S:
                shutil.rmtree(lock_path.parent, ignore_errors=True)


def write_token(folder: Path) -> Path:
    path = folder / "token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


@contextlib.contextmanager
def few_processes(ray: Any, forward_output: bool) -> Iterator[None]:
    """Ray, started in the block, leaves out what a cluster for one driver has no use for.

    That is the autoscaler, the dashboard's server, which runs even without its pages, and the forwarder of output that
    nobody wants (`forward_output`). They import Ray each: a third of the CPU seconds that a start takes.
    """
    parameter, node = ray._private.parameter, ray._private.node.Node
    before = (parameter.RayParams, node.start_api_server)
    parameter.RayParams = functools.partial(before[0], no_monitor=True, include_log_monitor=forward_output)
    node.start_api_server = _start_no_server
    try:
        yield
    finally:
        parameter.RayParams, node.start_api_server = before


def _start_no_server(node: Any, **_options: Any) -> None:
    node._webui_url = ""


@contextlib.contextmanager
def own_process_groups(ray: Any) -> Iterator[None]:
    """Ray's processes that are started in the block are out of reach of signals to this one's group.

    A terminal's Ctrl-C, `timeout` and service managers signal the whole group. Without its services, the driver would
    wait for them for seconds while it leaves.
    """
    services = ray._private.services
    before = services.ConsolePopen
    services.ConsolePopen = functools.partial(before, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before
