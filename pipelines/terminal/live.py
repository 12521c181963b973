"""What a person sees while a command runs: a live bar for the running node, or plain lines where there is no terminal.

`TerminalReport` draws; `NodeReport` is the `Report` that a stage gets, and hands each call to the terminal and to the
node's MLflow run. The plan and the summary are the command line's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from infra.registry import ModelFacts
from infra.tracking_models import TrainingFacts
from pipelines.reporting import Scalar
from pipelines.terminal.words import one_line

PLAIN_INTERVAL_S = 5.0
QUIET_S, MAX_QUIET_S = 10.0, 300.0
"""Silence after which a plain line says what is at work; then after 20 s, 40 s, ..., at least every five minutes."""
WATCH_INTERVAL_S = 1.0
REFRESH_PER_S = 5
ESTIMATE_SLACK = 0.1
"""Share by which an estimated total must change to be shown anew."""
MAX_QUOTED_CHARS = 60
RATE = re.compile(r"\d\S* [^\s/]+/s\b")
"""A rate in a note, such as "310 images/s"."""

logger = logging.getLogger(__name__)


class RunRecord(Protocol):
    """Where a node's figures are kept: `infra.tracking.RunHandle`, as far as a report needs it."""

    def params(self, values: Mapping[str, Scalar]) -> None: ...

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None: ...

    def figure(self, name: str, png: bytes) -> None: ...

    def document(self, name: str, text: str) -> None: ...

    def model(self, facts: ModelFacts) -> None: ...

    def checkpoints(self, facts: TrainingFacts) -> None: ...


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
    estimate: int | None = None
    """The total as it is shown, once it has turned out to be an estimate: training that ends by the clock has one."""
    is_told: bool = False
    """Whether a line says how it stands."""

    @property
    def is_complete(self) -> bool:
        return self.completed_s is not None

    def advance(self, done: int, total: int, note: str, now_s: float) -> None:
        if self.estimate is not None or total != self.total:
            self.estimate = _estimated(total, done, self.estimate)
        self.is_told = self.is_told and (done, total, note) == (self.done, self.total, self.note)
        self.done, self.total, self.note = done, total, note
        self.completed_s = now_s if done >= total > 0 else None

    def count(self) -> str:
        """Such as "1,200/3,700 URLs", "1,200/~3,700 steps" or "7 steps"."""
        if self.total <= 0:
            return f"{self.done:,} {self.unit}"
        about = self.estimate is not None and not self.is_complete
        return f"{self.done:,}/{f'~{self.estimate:,}' if about else f'{self.total:,}'} {self.unit}"

    def line(self, now_s: float) -> str:
        """Such as "1,200/3,700 URLs  32%  301/s  0:04 <0:08  loss 0.41".

        The rate is this process's: what was there when it began doesn't count. A note's own rate takes its place.
        """
        elapsed_s = (now_s if self.completed_s is None else self.completed_s) - self.started_s
        rate = (self.done - self.first_done) / elapsed_s if elapsed_s > 0 else 0.0
        parts = [self.count()]
        if self.total > 0:
            parts.append(f"{100 * self.done / self.total:.0f}%")
        if rate > 0 and not RATE.search(self.note):
            parts.append(f"{_significant(rate)}/s")
        left = f" <{_clock((self.total - self.done) / rate)}" if rate > 0 and self.done < self.total else ""
        parts.append(_clock(elapsed_s) + left)
        return "  ".join([*parts, self.note]).rstrip()


class TerminalReport:
    """Shows what one node at a time does on `stream`; may be called from any thread.

    On a terminal: one bar that is redrawn. Elsewhere: a line when a node starts, one at most every five seconds, one
    when a count is complete, and one after ten, twenty, forty seconds of silence. `clock` gives seconds; without
    `watch`, silence is not looked for.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic, *, watch: bool = True) -> None:
        self.console = Console(file=stream, highlight=False, soft_wrap=True)
        self._clock = clock
        self._watched = watch
        self._drawing = threading.RLock()
        self._node = ""
        self._work: _Work | None = None
        self._said = ""
        self._said_s = self._next_beat_s = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last_line_s = -math.inf

    @contextlib.contextmanager
    def node(self, name: str) -> Iterator[None]:
        """The node that runs in this block: named in front of its progress, which ends with the block."""
        with self._shown(name, "it started"):
            with self._drawing:
                if not self.console.is_terminal:
                    self._print(f"{name}: started")
            yield

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Something that takes a while outside of nodes, such as "starting Ray"."""
        with self._shown("", what):
            with self._drawing:
                self._print(what)
            yield

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        """`done` of `total` units; a total of 0 is unknown, one that changes an estimate. Another unit, or a count that
        is complete and begins again, is another count."""
        unit, note = one_line(unit), one_line(note)
        with self._drawing:
            now_s = self._clock()
            work = self._work
            if work is not None and work.is_complete and (work.unit, done) == (unit, work.done) and done >= total:
                self._go_on(work, note)
                return
            if work is None or work.unit != unit or work.is_complete:
                self._end_work()
                work = self._work = _Work(self._node, unit, done, now_s, done, total)
                self._last_line_s = -math.inf
            work.advance(done, total, note, now_s)
            words = not any(character.isdigit() for character in note)
            self._say(f"{work.count()}, {note}" if note and words else work.count())
            is_due = not self.console.is_terminal and now_s - self._last_line_s >= PLAIN_INTERVAL_S
            if work.is_complete or is_due:
                self._print_work(work)
            self._draw()

    def note(self, message: str) -> None:
        """One line, above the bar."""
        with self._drawing:
            message = one_line(message)
            self._say(_quoted(message))
            self._print(message)

    def beat(self) -> None:
        """Says what is at work if nothing has been said for a while. A thread of this report's own calls it."""
        with self._drawing:
            now_s = self._clock()
            if self._said and now_s >= self._next_beat_s:
                self._next_beat_s = now_s + min(MAX_QUIET_S, now_s - self._said_s)
                self._print(self._waiting(now_s))

    # -- what is shown -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _shown(self, node: str, said: str) -> Iterator[None]:
        """What is at work in this block, and for how long it has said nothing."""
        with self._drawing:
            self._node, self._work = node, None
            self._last_line_s = -math.inf
            self._say(said)
            self._draw()
        stopped = threading.Event()
        watcher = threading.Thread(target=self._watch, args=(stopped,), daemon=True, name="watch for silence")
        if self._watched and not self.console.is_terminal:
            watcher.start()
        try:
            yield
        finally:
            stopped.set()
            if watcher.ident is not None:
                watcher.join()
            with self._drawing:
                self._end_work()
                self._stop_bar()
                self._node = self._said = ""

    def _watch(self, stopped: threading.Event) -> None:
        while not stopped.wait(WATCH_INTERVAL_S):
            self.beat()

    def _say(self, said: str) -> None:
        self._said, self._said_s = said, self._clock()
        self._next_beat_s = self._said_s + QUIET_S

    def _go_on(self, work: _Work, note: str) -> None:
        """A complete count that is told again: what is done after it."""
        if note and note != work.note:
            work.note = note
            self._say(_quoted(note))
            if not self.console.is_terminal:
                self._print(f"{work.node}: {note}" if work.node else note)

    def _words(self) -> str:
        """Beside the bar: the same as the plain line, so that both kinds of output read alike."""
        now_s = self._clock()
        if self._work is not None and not self._work.is_complete:
            return self._work.line(now_s)
        return f"{_clock(now_s - self._said_s)} since {self._said}" if self._node else _clock(now_s - self._said_s)

    def _waiting(self, now_s: float) -> str:
        quiet = _clock(now_s - self._said_s)
        return (
            f"{self._node}: still working, {quiet} since {self._said}" if self._node else f"still {self._said}, {quiet}"
        )

    def _draw(self) -> None:
        if not self.console.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                _WordsColumn(self._words),
                console=self.console,
                refresh_per_second=REFRESH_PER_S,
                transient=True,
                # Both are the log file's while a command runs; taking them over here would bring chatter back.
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task(self._node or self._said, total=None)
            self._bar.start()
        assert self._task is not None
        work = self._work if self._work is not None and not self._work.is_complete else None
        done, total = (work.done, work.total or None) if work is not None else (0, None)
        self._bar.update(self._task, completed=done, total=total)

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def _end_work(self) -> None:
        """Leaves a line of how far a count came that is over."""
        work, self._work = self._work, None
        if work is not None and not work.is_told:
            self._print_work(work)

    def _print_work(self, work: _Work) -> None:
        work.is_told = True
        self._last_line_s = self._clock()
        name = f"{work.node}: " if work.node else ""
        self._print(name + work.line(self._last_line_s))

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)


class _WordsColumn(ProgressColumn):
    """What `words` says at the moment."""

    max_refresh = 1 / REFRESH_PER_S

    def __init__(self, words: Callable[[], str]) -> None:
        super().__init__()
        self._words = words

    def render(self, task: Task) -> Text:  # noqa: ARG002
        return Text(self._words(), no_wrap=True, overflow="ellipsis")


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

    def checkpoints(self, facts: TrainingFacts) -> None:
        logger.info("checkpoints %s", facts)
        if self._run:
            self._run.checkpoints(facts)

    def note(self, message: str) -> None:
        logger.info("%s", message)
        self._terminal.note(message)


def _quoted(message: str) -> str:
    return f'"{message if len(message) <= MAX_QUOTED_CHARS else message[: MAX_QUOTED_CHARS - 3].rstrip() + "..."}"'


def _estimated(total: int, done: int, shown: int | None) -> int:
    """An estimated total, to two digits; the one that is shown, unless it has changed by more than noise."""
    if shown is not None and done <= shown and abs(total - shown) <= ESTIMATE_SLACK * shown:
        return shown
    unit = int(10 ** max(0, len(str(total)) - 2))
    return math.ceil(total / unit) * unit


def _significant(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


PLAIN_WIDTH = 160


def console_on(stream: TextIO) -> Console:
    """A console as wide as the terminal; where there is none, wide enough that a line of a table stays a line."""
    return Console(file=stream, width=None if stream.isatty() else PLAIN_WIDTH)
