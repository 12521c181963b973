"""What lands in the log file, what reaches the terminal, and what is masked."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.logs import Repeats, captured_output, masked, secret_values, start_logging, warnings_shown


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    yield
    logging.captureWarnings(False)
    for handler in [handler for handler in root.handlers if handler not in before[1]]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(before[0])
    root.handlers[:] = before[1]


def test_records_and_warnings_go_to_the_private_file_and_are_appended(tmp_path: Path) -> None:
    path = start_logging(tmp_path, "quickstart")
    assert path == tmp_path / "logs" / "quickstart.log"
    assert path.stat().st_mode & 0o777 == 0o600
    logging.getLogger("pipelines.acquire").info("%d URLs", 3700)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("old setting", FutureWarning, stacklevel=1)
    start_logging(tmp_path, "quickstart")
    logging.getLogger("pipelines.acquire").info("resumed")
    lines = path.read_text().splitlines()
    assert lines[0].endswith("INFO pipelines.acquire: 3700 URLs")
    assert any("FutureWarning: old setting" in line for line in lines)
    assert lines[-1].endswith("resumed")
    assert path.read_text().count("resumed") == 1


def test_libraries_log_warnings_only(tmp_path: Path) -> None:
    path = start_logging(tmp_path, "run")
    logging.getLogger("alembic.runtime.migration").info("Running upgrade")
    logging.getLogger("sqlalchemy.pool").warning("pool exhausted")
    assert "Running upgrade" not in path.read_text()
    assert "pool exhausted" in path.read_text()


def test_secrets_never_reach_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
        "RAY_AUTH_TOKEN": "0123456789abcdef",
        "MLFLOW_TRACKING_PASSWORD": "correct horse",
        "hf_token": "hf_abcdefgh",
    }
    path = start_logging(tmp_path, "run")
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    log = logging.getLogger("infra.storage")
    log.info("connecting with %s", secrets)
    try:
        raise RuntimeError(f"403 for {secrets['AWS_SECRET_ACCESS_KEY']}")
    except RuntimeError:
        log.exception("refused at postgresql://user:hunter22@db.example/mlflow")
    text = path.read_text()
    assert "RuntimeError: 403 for ***" in text
    assert "postgresql://***@db.example/mlflow" in text
    for value in (*secrets.values(), "hunter22"):
        assert value not in text


def test_names_that_only_sound_secret_are_left_alone() -> None:
    environment = {
        "TOKENIZERS_PARALLELISM": "false-ish",
        "RAY_AUTH_TOKEN_PATH": "/tmp/token-file",
        "RAY_AUTH_MODE": "token-mode",
        "SSH_AUTH_SOCK": "/tmp/agent.socket",
        "PRIVATE_KEY": "short",
        "KEYBOARD": "qwertyuiop",
    }
    assert secret_values(environment) == []


def test_the_longest_secret_is_masked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdef")
    monkeypatch.setenv("B_TOKEN", "abcdefghij")
    assert masked("x abcdefghij y abcdef z") == "x *** y *** z"


def test_our_warnings_are_shown_and_others_are_not(tmp_path: Path) -> None:
    start_logging(tmp_path, "run")
    shown: list[str] = []
    with warnings_shown(shown.append):
        logging.getLogger("infra.tracking").warning("MLflow\n  is away")
        logging.getLogger("infra.tracking").info("delivered")
        logging.getLogger("ray.train").warning("chatter")
    logging.getLogger("infra.tracking").warning("after the end")
    assert shown == ["MLflow is away"]


CHATTY = """
import os, subprocess, sys
from pathlib import Path
from infra.logs import captured_output

print("before", flush=True)
try:
    with captured_output(Path(sys.argv[1])) as terminal:
        print("python chatter")
        os.write(2, b"native chatter\\n")
        subprocess.run(["sh", "-c", "echo child chatter; echo child error >&2"], check=True)
        print("progress", file=terminal)
        print(terminal.isatty(), file=terminal)
        if len(sys.argv) > 2:
            raise KeyError("mine")
except KeyError:
    print("failed")
print("after")
print("error after", file=sys.stderr)
"""


@pytest.mark.parametrize("failing", [[], ["failing"]])
def test_output_of_the_process_and_its_children_is_captured(tmp_path: Path, failing: list[str]) -> None:
    log = tmp_path / "run.log"
    log.write_text("earlier\n")
    result = subprocess.run(
        [sys.executable, "-c", CHATTY, str(log), *failing], capture_output=True, text=True, check=True, cwd=Path.cwd()
    )
    expected = ["before", "progress", "False", *(["failed"] if failing else []), "after"]
    assert result.stdout.splitlines() == expected
    assert result.stderr.splitlines() == ["error after"]
    lines = log.read_text().splitlines()
    assert lines[0] == "earlier"
    assert sorted(lines[1:]) == ["child chatter", "child error", "native chatter", "python chatter"]


def test_the_stream_is_the_terminal_if_there_is_one(tmp_path: Path) -> None:
    controller, terminal = os.openpty()
    try:
        subprocess.run(
            [sys.executable, "-c", CHATTY, str(tmp_path / "run.log")], stdout=terminal, check=True, cwd=Path.cwd()
        )
        assert os.read(controller, 1000).decode().split() == ["before", "progress", "True", "after"]
    finally:
        os.close(controller)
        os.close(terminal)


def test_a_replaced_stdout_is_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = io.StringIO()
    monkeypatch.setattr(sys, "stdout", replaced)
    with captured_output(tmp_path / "run.log") as terminal:
        print("chatter")
        print("progress", file=terminal)
    assert sys.stdout is replaced
    assert replaced.getvalue() == "progress\n"
    assert (tmp_path / "run.log").read_text() == "chatter\n"


def test_a_line_that_comes_again_and_again_is_written_once_with_a_count() -> None:
    repeats = Repeats()
    written = []
    for number in range(1, 422):
        written += repeats.told("cleaner", "Failed to query")
        written += repeats.told("worker", f"step {number}")
    written += repeats.told("cleaner", "gone")
    written += repeats.rest()
    cleaner = [line for line in written if "step" not in line]
    assert cleaner == [
        "Failed to query",
        "    10 times more: Failed to query",
        "    100 times more: Failed to query",
        "    420 times more: Failed to query",
        "gone",
    ]
    assert len(written) - len(cleaner) == 421


def test_repeats_of_records_are_counted_and_tracebacks_are_all_there(tmp_path: Path) -> None:
    path = start_logging(tmp_path, "run")
    log = logging.getLogger("pipelines.train")
    for _ in range(5):
        log.info("waiting for %s", "a node")
        logging.getLogger("infra.spool").info("still: away")
    log.info("going on")
    for _ in range(3):
        try:
            raise RuntimeError("mine")
        except RuntimeError:
            log.exception("a rank died")
    start_logging(tmp_path, "run")
    text = path.read_text()
    assert text.count("waiting for a node") == 2
    assert "    4 times more: INFO pipelines.train: waiting for a node\n" in text
    assert text.index("4 times more: INFO pipelines.train") < text.index("going on")
    assert "    4 times more: INFO infra.spool: still: away\n" in text
    assert text.count("RuntimeError: mine") == 3


FORWARDED = """
import logging, os, sys
from pathlib import Path
from infra.logs import captured_output

with captured_output(Path(sys.argv[1])):
    for number in range(22):
        print("\\x1b[36m(Cleaner pid=7)\\x1b[0m Failed to query", file=sys.stderr)
        print(f"\\x1b[36m(Worker pid=8)\\x1b[0m step {number} with {os.environ['A_TOKEN']}", file=sys.stderr)
    kept = logging.StreamHandler()
    print("no newline", end="")
kept.emit(logging.makeLogRecord({"msg": "too late"}))
print("after")
"""


def test_what_ray_prints_of_its_workers_is_without_colours_secrets_and_repeats(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    done = subprocess.run(
        [sys.executable, "-c", FORWARDED, str(log)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path.cwd(),
        env=os.environ | {"A_TOKEN": "0123456789"},
    )
    assert (done.stdout, done.stderr) == ("after\n", "")
    lines = log.read_text().splitlines()
    assert [line for line in lines if "Cleaner" in line] == [
        "(Cleaner pid=7) Failed to query",
        "    10 times more: (Cleaner pid=7) Failed to query",
        "    21 times more: (Cleaner pid=7) Failed to query",
    ]
    assert [line for line in lines if "Worker" in line] == [f"(Worker pid=8) step {n} with ***" for n in range(22)]
    assert "no newline" in lines
