"""What is written to a terminal (a real pseudo-terminal) and to a pipe, and where a node's report goes."""

from __future__ import annotations

import io
import os
import pty
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

import numpy as np
import pytest

from infra.registry import ModelFacts
from infra.tracking_models import TrainingFacts
from pipelines.reporting import Report, Scalar
from pipelines.terminal.live import NodeReport
from pipelines.terminal.live import TerminalReport as WatchingReport
from pipelines.terminal.words import one_line

FACTS = ModelFacts(revision="abc", location="/store/release/units/1", model_hash="f" * 64)
KEPT = TrainingFacts("train.base", "train.base/1", ())


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def TerminalReport(stream: TextIO, clock: Callable[[], float] = time.monotonic) -> WatchingReport:
    """Silence is looked for where a test says so."""
    return WatchingReport(stream, clock, watch=False)


class Recorded:
    """A run that remembers, in the place of MLflow's."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def params(self, values: Mapping[str, Scalar]) -> None:
        self.calls.append(("params", dict(values)))

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        self.calls.append(("metrics", dict(values), step))

    def figure(self, name: str, png: bytes) -> None:
        self.calls.append(("figure", name, png))

    def document(self, name: str, text: str) -> None:
        self.calls.append(("document", name, text))

    def model(self, facts: ModelFacts) -> None:
        self.calls.append(("model", facts))

    def checkpoints(self, facts: TrainingFacts) -> None:
        self.calls.append(("checkpoints", facts))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pipe() -> io.StringIO:
    return io.StringIO()


class Screen:
    """The far end of a pseudo-terminal, 100 columns wide."""

    def __init__(self) -> None:
        self.controller, terminal = pty.openpty()
        self.stream = os.fdopen(terminal, "w")

    def text(self) -> str:
        os.set_blocking(self.controller, False)
        found = b""
        try:
            while chunk := os.read(self.controller, 65536):
                found += chunk
        except BlockingIOError:
            pass
        return found.decode()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    opened = Screen()
    yield opened
    opened.stream.close()
    os.close(opened.controller)


def test_a_pipe_gets_a_line_every_five_seconds_and_one_at_the_end(pipe: io.StringIO, clock: Clock) -> None:
    terminal = TerminalReport(pipe, clock)
    with terminal.node("acquire"):
        for done in range(0, 3701, 100):
            terminal.progress(done, 3700, "URLs", "2 hosts")
            clock.now_s += 0.5
    assert pipe.getvalue().splitlines() == [
        "acquire: started",
        "acquire: 0/3,700 URLs  0%  0:00  2 hosts",
        "acquire: 1,000/3,700 URLs  27%  200/s  0:05 <0:14  2 hosts",
        "acquire: 2,000/3,700 URLs  54%  200/s  0:10 <0:08  2 hosts",
        "acquire: 3,000/3,700 URLs  81%  200/s  0:15 <0:04  2 hosts",
        "acquire: 3,700/3,700 URLs  100%  200/s  0:18  2 hosts",
    ]
    assert "\x1b" not in pipe.getvalue()


def test_what_was_there_before_does_not_count_as_speed(pipe: io.StringIO, clock: Clock) -> None:
    terminal = TerminalReport(pipe, clock)
    with terminal.node("encode.base"):
        terminal.progress(900, 1000, "images")
        clock.now_s += 10
        terminal.progress(950, 1000, "images")
    assert pipe.getvalue().splitlines()[-1] == "encode.base: 950/1,000 images  95%  5/s  0:10 <0:10"


def test_another_unit_or_node_begins_another_count(pipe: io.StringIO, clock: Clock) -> None:
    terminal = TerminalReport(pipe, clock)
    with terminal.node("encode"):
        terminal.progress(5, 5, "captions")
        clock.now_s += 5
        terminal.progress(1, 2, "images")
        clock.now_s += 1
        terminal.progress(2, 2, "images")
    with terminal.node("train.base"):
        terminal.progress(7, 0, "steps", "loss 0.41")
    assert pipe.getvalue().splitlines() == [
        "encode: started",
        "encode: 5/5 captions  100%  0:00",
        "encode: 1/2 images  50%  0:00",
        "encode: 2/2 images  100%  1/s  0:01",
        "train.base: started",
        "train.base: 7 steps  0:00  loss 0.41",
    ]


def test_a_complete_count_is_told_at_once_and_what_comes_after_it(pipe: io.StringIO, clock: Clock) -> None:
    terminal = TerminalReport(pipe, clock)
    with terminal.node("evaluate.base"):
        terminal.progress(0, 300, "images", "loading")
        clock.now_s += 3
        terminal.progress(300, 300, "images", "90 images/s")
        assert pipe.getvalue().splitlines()[-1] == "evaluate.base: 300/300 images  100%  0:03  90 images/s"
        clock.now_s += 3
        terminal.progress(300, 300, "images", "measuring")
        terminal.progress(300, 300, "images", "measuring")
        assert pipe.getvalue().splitlines()[-1] == "evaluate.base: measuring"
        terminal.progress(0, 2, "images")
        terminal.progress(2, 2, "images")
    assert [line.partition(": ")[2].split()[0] for line in pipe.getvalue().splitlines()] == [
        "started",
        "0/300",
        "300/300",
        "measuring",
        "0/2",
        "2/2",
    ]


def test_a_note_that_tells_a_rate_leaves_one_rate_on_the_line(pipe: io.StringIO, clock: Clock) -> None:
    terminal = TerminalReport(pipe, clock)
    with terminal.node("train.base"):
        terminal.progress(0, 100, "steps", "loss 2.0")
        clock.now_s += 5
        terminal.progress(10, 100, "steps", "loss 1.9, 310 images/s")
        clock.now_s += 5
        terminal.progress(20, 100, "steps", "loss 1.8")
    assert pipe.getvalue().splitlines()[2:] == [
        "train.base: 10/100 steps  10%  0:05 <0:45  loss 1.9, 310 images/s",
        "train.base: 20/100 steps  20%  2/s  0:10 <0:40  loss 1.8",
    ]


def test_a_total_that_is_estimated_from_the_clock_does_not_run_to_and_fro(pipe: io.StringIO, clock: Clock) -> None:
    """A training that ends after so many seconds tells, each time, how many steps it would come to at this speed."""
    terminal = TerminalReport(pipe, clock)
    random = np.random.default_rng(0)
    seconds, step = 0.0, 0
    with terminal.node("train.base"):
        while seconds < 240:
            step += 20
            seconds = min(240.0, seconds + 10 * random.uniform(0.8, 1.2))
            clock.now_s = 100.0 + seconds
            terminal.progress(step, max(step, round(step * 240 / seconds)), "steps")
    lines = pipe.getvalue().splitlines()[1:]
    totals = [line.split()[1].partition("/")[2] for line in lines]
    percents = [int(line.split()[3].rstrip("%")) for line in lines]
    assert percents == sorted(percents)
    assert totals[-1] == f"{step:,}"
    assert all(total.startswith("~") for total in totals[1:-1])
    assert len(set(totals[1:-1])) <= 3


def test_silence_is_broken_by_who_is_at_work_and_since_when(pipe: io.StringIO, clock: Clock) -> None:
    terminal = TerminalReport(pipe, clock)

    def wait(seconds: float) -> list[str]:
        before = len(pipe.getvalue())
        for _ in range(round(seconds)):
            clock.now_s += 1
            terminal.beat()
        return pipe.getvalue()[before:].splitlines()

    with terminal.doing("starting Ray on this machine"):
        assert wait(9) == []
        assert wait(11) == [
            "still starting Ray on this machine, 0:10",
            "still starting Ray on this machine, 0:20",
        ]
    assert wait(30) == []
    with terminal.node("train.base"):
        assert wait(10) == ["train.base: still working, 0:10 since it started"]
        terminal.note("train.base goes on from the checkpoint of step 50")
        assert wait(10) == ['train.base: still working, 0:10 since "train.base goes on from the checkpoint of step 50"']
        terminal.progress(0, 2, "ranks", "starting")
        assert wait(10) == ["train.base: still working, 0:10 since 0/2 ranks, starting"]
        terminal.progress(60, 80, "steps", "loss 0.41")
        assert wait(10) == ["train.base: still working, 0:10 since 60/80 steps"]
        terminal.progress(80, 80, "steps")
        assert wait(45) == [
            "train.base: still working, 0:10 since 80/80 steps",
            "train.base: still working, 0:20 since 80/80 steps",
            "train.base: still working, 0:40 since 80/80 steps",
        ]
        assert 10 <= len(wait(3600)) <= 15
    assert wait(30) == []


def test_silence_is_looked_for_by_itself(pipe: io.StringIO, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.terminal.live.WATCH_INTERVAL_S", 0.01)
    terminal = WatchingReport(pipe, clock)
    with terminal.node("select"):
        clock.now_s += 11
        deadline_s = time.monotonic() + 20
        while "still working" not in pipe.getvalue() and time.monotonic() < deadline_s:
            time.sleep(0.01)
    assert pipe.getvalue().splitlines() == [
        "select: started",
        "select: still working, 0:11 since it started",
    ]
    assert not [thread for thread in threading.enumerate() if "silence" in thread.name and thread.is_alive()]


def test_a_node_that_fails_leaves_where_it_was(pipe: io.StringIO, clock: Clock) -> None:
    terminal = TerminalReport(pipe, clock)

    def fail() -> None:
        with terminal.node("acquire"):
            terminal.progress(0, 10, "URLs")
            terminal.progress(3, 10, "URLs")
            raise KeyError("mine")

    with pytest.raises(KeyError):
        fail()
    assert pipe.getvalue().splitlines()[-1].startswith("acquire: 3/10 URLs  30%")


def test_a_terminal_gets_one_bar_that_is_redrawn_and_a_line_in_its_place(screen: Screen, clock: Clock) -> None:
    terminal = TerminalReport(screen.stream, clock)
    with terminal.node("acquire"):
        terminal.progress(0, 3700, "URLs")
        clock.now_s += 2
        terminal.progress(600, 3700, "URLs")
        assert terminal._bar is not None
        terminal._bar.refresh()
        live = screen.text()
        assert "acquire" in live
        assert "600/3,700 URLs  16%  300/s  0:02 <0:10" in live
        assert "━" in live
        terminal.note("one host is slow")
        noted = screen.text()
        assert "one host is slow\r\n" in noted
        clock.now_s += 10
        terminal.progress(3700, 3700, "URLs")
    rest = screen.text()
    assert "acquire: 3,700/3,700 URLs  100%  308/s  0:12\r\n" in rest
    assert rest.endswith("\r\x1b[1A\x1b[2K")  # the bar is gone
    assert "\x1b[?25h" in rest  # the cursor is back


def test_text_from_the_web_can_not_drive_the_terminal(screen: Screen, pipe: io.StringIO) -> None:
    hostile = "a\x1b]0;owned\x07 caption\r\n[red]b\x9b2J"
    assert one_line(hostile) == "a ]0;owned caption [red]b 2J"
    for terminal, written in ((TerminalReport(pipe), pipe.getvalue), (TerminalReport(screen.stream), screen.text)):
        terminal.note(hostile)
        assert written().rstrip() == "a ]0;owned caption [red]b 2J"


def test_a_long_note_stays_one_line_in_a_pipe(pipe: io.StringIO) -> None:
    TerminalReport(pipe).note("word " * 100)
    assert len(pipe.getvalue().splitlines()) == 1


def test_threads_may_report_at_once(screen: Screen) -> None:
    terminal = TerminalReport(screen.stream)
    errors: list[BaseException] = []

    def work(unit: str) -> None:
        try:
            for done in range(50):
                terminal.progress(done, 50, unit)
                if done % 25 == 0:
                    terminal.note(f"{unit} {done}")
        except BaseException as error:
            errors.append(error)
            raise

    read = threading.Event()
    written: list[str] = []

    def reader() -> None:  # a terminal that nobody reads would block its writers
        while not read.wait(0.005):
            written.append(screen.text())
        written.append(screen.text())

    watching = threading.Thread(target=reader)
    watching.start()
    with terminal.node("node"):
        threads = [threading.Thread(target=work, args=("items",)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    read.set()
    watching.join()
    assert errors == []
    assert "".join(written).count("items 25") == 4


def test_a_node_reports_to_its_run_and_to_the_terminal(pipe: io.StringIO) -> None:
    run = Recorded()
    report: Report = NodeReport(TerminalReport(pipe), run)
    report.params({"lr": 1e-4})
    report.metrics({"loss": 0.5}, 3)
    report.metrics({"seconds": 2.0})
    report.progress(1, 2, "steps")
    report.figure("grid.png", b"png")
    report.document("manifest.json", "{}")
    report.model(FACTS)
    report.checkpoints(KEPT)
    report.note("half done")
    assert run.calls == [
        ("params", {"lr": 1e-4}),
        ("metrics", {"loss": 0.5}, 3),
        ("metrics", {"seconds": 2.0}, None),
        ("figure", "grid.png", b"png"),
        ("document", "manifest.json", "{}"),
        ("model", FACTS),
        ("checkpoints", KEPT),
    ]
    assert pipe.getvalue().splitlines() == ["1/2 steps  50%  0:00", "half done"]


@pytest.mark.parametrize(
    "call",
    [
        lambda report: report.params({"a": 1}),
        lambda report: report.metrics({"a": 1.0}),
        lambda report: report.figure("a.png", b""),
        lambda report: report.document("a.txt", ""),
        lambda report: report.model(FACTS),
        lambda report: report.checkpoints(KEPT),
    ],
)
def test_a_node_without_a_run_works(pipe: io.StringIO, call: Callable[[Report], None]) -> None:
    call(NodeReport(TerminalReport(pipe), None))
    assert pipe.getvalue() == ""
