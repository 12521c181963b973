"""Ctrl-C and SIGTERM as one thing: an interruption, which a second signal makes immediate."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

EXIT_INTERRUPTED = 130
SAME_INTERRUPTION_S = 1.0
"""Signals this soon after the first are its echo: a shell, `timeout` or a service manager may send it to a process and
to its group."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_before_exit: list[Callable[[], object]] = []
_depth = 0
_interrupted_s: float | None = None


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise `KeyboardInterrupt` in the main thread while the block runs, whatever they did before.

    A second one, while the block is being left, ends the process at once with exit code 130, after what
    `before_exit` names. Blocks may be nested, also inside code that has put other handlers in place; leaving one brings
    back the handlers from before it. In other threads it does nothing: Python runs handlers in the main one.
    """
    global _depth, _interrupted_s  # noqa: PLW0603 - a process has one set of handlers
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    _depth += 1
    try:
        for number in _SIGNALS:
            signal.signal(number, _interrupt)
        yield
    finally:
        for number, handler in handlers.items():
            _restore(number, handler)
        _depth -= 1
        if not _depth:
            _interrupted_s = None


@contextlib.contextmanager
def before_exit(call: Callable[[], object]) -> Iterator[None]:
    """While the block runs, a second signal calls `call` before it ends the process: to end others first.

    It is called in a signal handler, and must not wait for anything.
    """
    _before_exit.append(call)
    try:
        yield
    finally:
        _before_exit.remove(call)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    global _interrupted_s  # noqa: PLW0603
    now_s = time.monotonic()
    if _interrupted_s is None:
        _interrupted_s = now_s
        raise KeyboardInterrupt
    if now_s - _interrupted_s > SAME_INTERRUPTION_S:
        for call in reversed(_before_exit):
            with contextlib.suppress(Exception):
                call()
        os._exit(EXIT_INTERRUPTED)


def _restore(number: signal.Signals, handler: Any) -> None:
    if handler is not None:  # else one that wasn't set from Python, and can't be
        signal.signal(number, handler)
