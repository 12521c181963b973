"""Where the libraries' chatter goes: into one log file per run, so that the terminal shows the run itself.

Python's log records and warnings, and whatever is written to file descriptors 1 and 2, by this process or by those it
starts. Values of secret environment variables are masked in log records. What the terminal shows is the caller's.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TextIO

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


class _RunLogHandler(logging.FileHandler):
    """Its own class, so that a later run in the same process finds and closes it."""


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
    handler = _RunLogHandler(path, encoding="utf-8")
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
    """Also hands this project's own warnings and errors, masked and in one line each, to `show`, for the terminal."""
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
    log = os.fdopen(log_fd, "w", encoding="utf-8", errors="replace", buffering=1)
    terminal = _stream_to(os.dup(1), stdout) if _descriptor(stdout) == 1 else stdout
    try:
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        sys.stdout = stdout if _descriptor(stdout) == 1 else log
        sys.stderr = stderr if _descriptor(stderr) == 2 else log
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
