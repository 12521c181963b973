"""Where the libraries' chatter goes: into one log file per run, so that the terminal shows the run itself.

Python's log records and warnings, and whatever is written to file descriptors 1 and 2, by this process or by those it
starts. In log records, and in what this process prints (Ray prints its workers' output here), values of secret
environment variables are masked, and a line that comes again and again is written once, with a count. What the
terminal shows is the caller's.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, TextIO

PROJECT_LOGGERS = ("configs", "infra", "ldm", "pipelines")
MASK = "***"

# Their INFO says nothing about a run.
QUIET_LOGGERS = (
    "PIL",
    "aiohttp.access",
    "alembic",
    "asyncio",
    "botocore",
    "dagster",
    "datasets",
    "filelock",
    "fsspec",
    "httpx",
    "matplotlib",
    "mlflow",
    "numexpr",
    "s3fs",
    "sqlalchemy",
    "torch",
    "transformers",
    "urllib3",
)

_SECRET_WORDS = {"AUTH", "CREDENTIAL", "CREDENTIALS", "KEY", "PASSPHRASE", "PASSWD", "PASSWORD", "SECRET", "TOKEN"}
_HARMLESS_LAST_WORDS = {"DIR", "FILE", "MODE", "NAME", "PATH", "SOCK", "TYPE"}
_MIN_SECRET_LENGTH = 6
_PASSWORD_IN_URL = re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_WORKER = re.compile(r"\(([^()]* pid=\d+[^()]*)\)")
"""Prefix that Ray puts before each line that a worker prints."""
_MAX_SOURCES = 1000
_TOLD_COUNTS = {10**power for power in range(1, 10)}


class StateDirError(Exception):
    """The state folder can't be written; the message names it, and says what to do."""

    @classmethod
    def of(cls, state_dir: Path, error: BaseException) -> StateDirError:
        cause = getattr(error, "strerror", None) or (str(error).strip() or type(error).__name__).splitlines()[0]
        return cls(
            f"can't write {state_dir}: {cause}; logs and histories need a local folder that has room and may be written"
            " (recipe key `state_dir`), then run the same command again"
        )


def secret_values(environment: Mapping[str, str]) -> list[str]:
    """The values of variables whose names have a word like TOKEN, KEY or PASSWORD, longest first.

    Names that end in PATH, FILE, MODE and the like hold no secret themselves, and values under six characters would
    mask ordinary words.
    """
    found = set()
    for name, value in environment.items():
        words = re.split(r"[^A-Z0-9]+", name.upper())
        if len(value) >= _MIN_SECRET_LENGTH and words[-1] not in _HARMLESS_LAST_WORDS and _SECRET_WORDS & set(words):
            found.add(value)
    return sorted(found, key=len, reverse=True)


def masked(text: str) -> str:
    """`text` without the secrets of this process's environment and without passwords in URLs."""
    for secret in secret_values(os.environ):
        text = text.replace(secret, MASK)
    return _PASSWORD_IN_URL.sub(MASK, text)


class MaskingFormatter(logging.Formatter):
    """Masks the finished line, so that arguments and tracebacks are covered too."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))


class Repeats:
    """Lines of many sources without the repeats: of a source's same line again, a count is told, when it reaches 10,
    100, 1,000 ..., and when the source says something else. What lies between two lines of a source is no matter."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[str, int]] = {}

    def told(self, source: str, line: str) -> list[str]:
        """Lines to write to the log for one that was printed: none for a repeat, its count before another."""
        last, count = self._last.get(source, (None, 0))
        if line == last:
            self._last[source] = (line, count + 1)
            return self._count(source) if count + 1 in _TOLD_COUNTS else []
        rest = self._count(source)
        if len(self._last) >= _MAX_SOURCES:
            self._last.clear()
        self._last[source] = (line, 0)
        return [*rest, line]

    def rest(self) -> list[str]:
        """The counts that are still to be told, at the end."""
        return [line for source in list(self._last) for line in self._count(source)]

    def _count(self, source: str) -> list[str]:
        line, count = self._last.get(source, ("", 0))
        return [f"    {count} times more: {line}"] if count else []


class _RunLogHandler(logging.FileHandler):
    """Its own class, so that a later run in the same process finds and closes it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self._repeats = Repeats()

    def emit(self, record: logging.LogRecord) -> None:
        """A record with a traceback is written every time."""
        try:
            message = masked(f"{record.levelname} {record.name}: {record.getMessage()}")
        except (TypeError, ValueError):  # arguments that don't fit: the base class says so
            super().emit(record)
            return
        lines = self._repeats.told(record.name, message)
        for line in lines:
            if line != message:
                self._write(line)
        if message in lines or record.exc_info:
            super().emit(record)

    def close(self) -> None:
        with self.lock or contextlib.nullcontext():
            for line in self._repeats.rest():
                self._write(line)
            self._repeats = Repeats()
        super().close()

    def _write(self, line: str) -> None:
        if self.stream is not None:
            self.stream.write(line + self.terminator)


def start_logging(state_dir: Path, run_name: str) -> Path:
    """Sends this process's log records and warnings to `<state_dir>/logs/<run_name>.log`, and nowhere else.

    The file is appended to and readable by its owner alone. Called again, it goes on in another file. The libraries
    named in `QUIET_LOGGERS` log warnings only. Returns the file's path. Raises `StateDirError`.
    """
    path = state_dir / "logs" / f"{run_name}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except OSError as error:
        raise StateDirError.of(state_dir, error) from error
    handler = _RunLogHandler(path)
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in [old for old in root.handlers if isinstance(old, logging.StreamHandler)]:
        if isinstance(old, _RunLogHandler) or type(old) is logging.StreamHandler:
            root.removeHandler(old)
        if isinstance(old, _RunLogHandler):
            old.close()
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    return path


@contextlib.contextmanager
def warnings_shown(show: Callable[[str], None]) -> Iterator[None]:
    """A context in which `show` is given this project's own warnings and errors too, masked and in one line each, for
    the terminal."""
    handler = _CallingHandler(show)
    loggers = [logging.getLogger(name) for name in PROJECT_LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _CallingHandler(logging.Handler):
    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._show = show

    def emit(self, record: logging.LogRecord) -> None:
        self._show(masked(" ".join(record.getMessage().split())))


@contextlib.contextmanager
def captured_output(log_path: Path) -> Iterator[TextIO]:
    """Sends file descriptors 1 and 2 to the end of `log_path`; the block gets a stream to where 1 led before.

    Child processes inherit the redirection, so that a server's or worker's output lands in the file as well. Where
    `sys.stdout` does not lead to descriptor 1 (a notebook, a test runner), the block gets that `sys.stdout`.
    """
    stdout, stderr = sys.stdout, sys.stderr
    _flush(stdout, stderr)
    before = (os.dup(1), os.dup(2))
    log_fd = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    log = _PrintedLines(os.fdopen(log_fd, "wb"))
    terminal = _stream_to(os.dup(1), stdout) if _descriptor(stdout) == 1 else stdout
    try:
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        sys.stdout = sys.stderr = log
        yield terminal
    finally:
        _flush(sys.stdout, sys.stderr, terminal)
        sys.stdout, sys.stderr = stdout, stderr
        for descriptor, target in zip(before, (1, 2), strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
        log.close()
        if terminal is not stdout:
            terminal.close()


class _PrintedLines(io.TextIOWrapper):
    """Stream for what this process prints: line by line into the log, without colours, secrets and repeats."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8", errors="replace", line_buffering=True)
        self._repeats = Repeats()
        self._begun = ""
        self._writing = threading.RLock()

    def write(self, text: str) -> int:
        with self._writing:
            if self.closed:  # a handler that was made meanwhile has kept this stream, and nobody reads it any more
                return len(text)
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                self._print(line)
        return len(text)

    def flush(self) -> None:
        if not self.closed:
            super().flush()

    def close(self) -> None:
        if not self.closed:
            with self._writing:
                if self._begun:
                    self._print(self._begun)
                self._begun = ""
                for line in self._repeats.rest():
                    super().write(line + "\n")
        super().close()

    def _print(self, line: str) -> None:
        line = masked(_COLOUR.sub("", line))
        worker = _WORKER.match(line)
        for told in self._repeats.told(worker[1] if worker else "", line):
            super().write(told + "\n")


def _stream_to(descriptor: int, like: TextIO) -> TextIO:
    return os.fdopen(descriptor, "w", encoding=like.encoding or "utf-8", errors="replace", buffering=1)


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (io.UnsupportedOperation, AttributeError, ValueError):
        return None


def _flush(*streams: TextIO) -> None:
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):  # a closed pipe or stream has nobody to read it
            stream.flush()
