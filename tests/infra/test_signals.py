"""Ctrl-C and SIGTERM interrupt, once; the second time they end the process, and what it has started."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from infra import signals
from infra.signals import interruptible

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Foreign(BaseException):
    """What another library's handler raises."""


def foreign(number: int, frame: FrameType | None) -> None:
    raise Foreign


@pytest.fixture(autouse=True)
def handlers_of_others() -> Iterator[None]:
    before = {number: signal.signal(number, foreign) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_raises_keyboard_interrupt_whatever_it_did_before(number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(number)
    with pytest.raises(Foreign):
        signal.raise_signal(number)


def test_blocks_are_nested_around_other_handlers() -> None:
    with interruptible():
        signal.signal(signal.SIGTERM, foreign)
        with pytest.raises(Foreign):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is foreign
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)  # the first one of this block


def test_the_echo_of_a_signal_is_not_a_second_one() -> None:
    """A shell sends it to the group, and a wrapper once more to the process."""
    with interruptible():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_ends_all_at_once() -> None:
    code = (
        "import subprocess, time\n"
        "from infra import signals\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "with signals.interruptible(), signals.before_exit(lambda: 1 / 0), signals.before_exit(child.kill):\n"
        "    try:\n"
        "        print(child.pid, flush=True)\n"
        "        time.sleep(600)\n"
        "    finally:\n"
        "        print('leaving', flush=True)\n"
        "        time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.terminate()
    assert process.stdout.readline() == "leaving\n"
    time.sleep(signals.SAME_INTERRUPTION_S + 0.1)
    process.terminate()
    assert process.wait(timeout=30) == 130
    assert process.stdout.read() == ""
    process.stdout.close()
    deadline_s = time.monotonic() + 30  # it was sent SIGKILL, and is given a moment to go
    while _runs(child) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    assert not _runs(child)


def test_in_another_thread_nothing_changes() -> None:
    def enter() -> None:
        with interruptible():
            assert signal.getsignal(signal.SIGINT) is foreign

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()


def _runs(pid: int | str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
