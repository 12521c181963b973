"""Processes that must not outlive this one: found by their command line, ended, and killed with it.

What they do, and whether they may be killed, is the caller's matter.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import time
from collections.abc import Collection, Iterable, Iterator

import psutil

KILL_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


def started_with(text: str) -> list[psutil.Process]:
    """This process's children that were started with `text` on their command line, and all of theirs."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(text in argument for argument in child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def end(processes: Collection[psutil.Process], asked: Collection[psutil.Process], grace_s: float) -> None:
    """Kills `processes`, after those of them that are in `asked` had `grace_s` to end themselves."""
    for process in asked:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _wait(asked, grace_s)
    kill(processes)
    _wait(processes, KILL_TIMEOUT_S)
    for process in _running(processes):
        logger.warning("process %d could not be stopped", process.pid)


def kill(processes: Iterable[psutil.Process]) -> None:
    """Kills `processes` and the groups that they lead: there are those whose parent is gone."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if process.is_running() and _leads_a_group(process):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()


def _leads_a_group(process: psutil.Process) -> bool:
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(process.pid) == process.pid
    return False


def _wait(processes: Iterable[psutil.Process], timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while _running(processes) and time.monotonic() < deadline_s:
        time.sleep(0.02)


def _running(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    running = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
    return running


@contextlib.contextmanager
def killed_with_this_process(processes: Iterable[psutil.Process]) -> Iterator[None]:
    """A shell that waits for the end of a pipe from here, and kills `processes` if this one dies inside the block.

    It kills the groups that they lead, and with them whatever they have started since.
    """
    targets = [str(-process.pid if _leads_a_group(process) else process.pid) for process in processes]
    watcher = subprocess.Popen(
        ["/bin/sh", "-c", 'read -r _; kill -9 "$@" 2>/dev/null', "sh", *targets],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        watcher.kill()
        watcher.communicate()
