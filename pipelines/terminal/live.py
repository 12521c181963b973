"""What a person sees while a command runs: a live bar for the running node, or plain lines where there is no terminal.

`TerminalReport` draws; `NodeReport` is the `Report` that a stage gets, and hands each call to the terminal and to the
node's MLflow run. The plan and the summary are the command line's.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from infra.registry import ModelFacts
from pipelines.reporting import Scalar
from pipelines.terminal.words import one_line

PLAIN_INTERVAL_S = 5.0
REFRESH_PER_S = 5


logger = logging.getLogger(__name__)


class RunRecord(Protocol):
    """Where a node's figures are kept: `infra.tracking.RunHandle`, as far as a report needs it."""

    def params(self, values: Mapping[str, Scalar]) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None: ...

    def figure(self, name: str, png: bytes) -> None: ...

    def document(self, name: str, text: str) -> None: ...

    def model(self, facts: ModelFacts) -> None: ...


@dataclass
class _Work:
    """One count of one node: so many of so many units, since when."""

    node: str
    unit: str
    first_done: int
    started_s: float
    done: int
    total: int
    note: str = ""
    completed_s: float | None = None

    def advance(self, done: int, total: int, note: str, now_s: float) -> None:
        self.done, self.total, self.note = done, total, note
        self.completed_s = now_s if done >= total > 0 else None

    def line(self, now_s: float) -> str:
        """Such as "1,200/3,700 URLs  32%  301/s  0:04 <0:08  loss 0.41".

        The rate is this process's: what was there when it began doesn't count.
        """
        elapsed_s = (now_s if self.completed_s is None else self.completed_s) - self.started_s
        rate = (self.done - self.first_done) / elapsed_s if elapsed_s > 0 else 0.0
        parts = [f"{self.done:,}/{self.total:,} {self.unit}" if self.total > 0 else f"{self.done:,} {self.unit}"]
        if self.total > 0:
            parts.append(f"{100 * self.done / self.total:.0f}%")
        if rate > 0:
            parts.append(f"{_significant(rate)}/s")
        left = f" <{_clock((self.total - self.done) / rate)}" if rate > 0 and self.done < self.total else ""
        parts.append(_clock(elapsed_s) + left)
        return "  ".join([*parts, self.note]).rstrip()


class TerminalReport:
    """Shows the progress and notes of one node at a time on `stream`; may be called from any thread.

    On a terminal: one bar that is redrawn. Elsewhere: a line at most every five seconds, and one at the end. `clock`
    gives seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self._clock = clock
        self._drawing = threading.RLock()
        self._node = ""
        self._work: _Work | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line_s = -PLAIN_INTERVAL_S

    @contextlib.contextmanager
    def node(self, name: str) -> Iterator[None]:
        """The node that runs in this block: named in front of its progress, which ends with the block."""
        with self._drawing:
            self._end_work()
            self._node = name
            self._last_line_s = -PLAIN_INTERVAL_S
        try:
            yield
        finally:
            with self._drawing:
                self._end_work()
                self._node = ""

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """`done` of `total` units; a total of 0 is unknown. Another unit begins another count."""
        unit, note = one_line(unit), one_line(note)
        with self._drawing:
            now_s = self._clock()
            if self._work is None or self._work.unit != unit:
                self._end_work()
                self._work = _Work(self._node, unit, done, now_s, done, total)
            self._work.advance(done, total, note, now_s)
            if self.console.is_terminal:
                self._draw()
            elif now_s - self._last_line_s >= PLAIN_INTERVAL_S and done < total:
                self._last_line_s = now_s
                self._print_work(self._work)

    def note(self, message: str) -> None:
        """One line, above the bar."""
        with self._drawing:
            self._print(one_line(message))

    def _draw(self) -> None:
        assert self._work is not None
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                _WorkColumn(self._work, self._clock),
                console=self.console,
                refresh_per_second=REFRESH_PER_S,
                transient=True,
                # Both are the log file's while a command runs; taking them over here would bring chatter back.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task(self._work.node, total=None)
            self._bar.start()
        assert self._task is not None
        total = self._work.total if self._work.total > 0 else None
        self._bar.update(self._task, completed=self._work.done, total=total)

    def _end_work(self) -> None:
        """Takes the bar away and leaves a line in its place."""
        work, self._work = self._work, None
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
        if work is not None:
            self._print_work(work)

    def _print_work(self, work: _Work) -> None:
        name = f"{work.node}: " if work.node else ""
        self._print(name + work.line(self._clock()))

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)


class _WorkColumn(ProgressColumn):
    """The same words as the plain line, so that both kinds of output read alike."""

    max_refresh = 1 / REFRESH_PER_S

    def __init__(self, work: _Work, clock: Callable[[], float]) -> None:
        super().__init__()
        self._work = work
        self._clock = clock

    def render(self, task: Task) -> Text:  # noqa: ARG002
        return Text(self._work.line(self._clock()), no_wrap=True, overflow="ellipsis")


class NodeReport:
    """The `Report` of one node: progress and notes to the terminal, the rest to its run, all of it to the log."""

    def __init__(self, terminal: TerminalReport, run: RunRecord | None) -> None:
        self._terminal = terminal
        self._run = run

    def params(self, values: Mapping[str, Scalar]) -> None:
        logger.info("params %s", dict(values))
        if self._run:
            self._run.params(values)

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        logger.info("metrics step=%s %s", step, dict(values))
        if self._run:
            self._run.metrics(values, step)

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        self._terminal.progress(done, total, unit, note)

    def figure(self, name: str, png: bytes) -> None:
        logger.info("figure %s (%d bytes)", name, len(png))
        if self._run:
            self._run.figure(name, png)

    def document(self, name: str, text: str) -> None:
        logger.info("document %s (%d characters)", name, len(text))
        if self._run:
            self._run.document(name, text)

    def model(self, facts: ModelFacts) -> None:
        logger.info("model %s", facts)
        if self._run:
            self._run.model(facts)

    def note(self, message: str) -> None:
        logger.info("%s", message)
        self._terminal.note(message)


def _significant(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


PLAIN_WIDTH = 160


def console_on(stream: TextIO) -> Console:
    """As wide as the terminal; where there is none, wide enough that a line of a table stays a line."""
    return Console(file=stream, width=None if stream.isatty() else PLAIN_WIDTH)
