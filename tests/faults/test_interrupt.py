"""Ctrl-C and SIGTERM: one line, exit code 130, nobody left behind, and what was finished is there for the next run."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image
from tiny import TinyRecipe, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
MESSAGE = "error: interrupted; what was finished is kept: run the same command again to go on"


class Server(ThreadingHTTPServer):
    """Answers the first four requests at once, and keeps the others waiting until `go_on`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = threading.Semaphore(0)
        self.go_on = threading.Event()
        self.quick = threading.Semaphore(4)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.release()
        if not self.server.quick.acquire(blocking=False):
            self.server.go_on.wait(120)
        sink = io.BytesIO()
        Image.new("RGB", (64, 64), (hash(self.path) % 256, 128, 64)).save(sink, "PNG")
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(sink.tell()))
        self.end_headers()
        self.wfile.write(sink.getvalue())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    opened = Server()
    thread = threading.Thread(target=opened.serve_forever, daemon=True)
    thread.start()
    yield opened
    opened.go_on.set()
    opened.shutdown()
    thread.join()
    opened.server_close()


@pytest.fixture
def recipe(server: Server, tmp_path: Path) -> Path:
    """Sixteen images in shards of four: the first shard can be had, the others take their time."""
    address = f"127.0.0.1:{server.server_address[1]}"
    rows = [f"http://{address}/{number}.png,picture {number}" for number in range(16)]
    (tmp_path / "pairs.csv").write_text("\n".join(["url,caption", *rows]))
    settings = {
        "name": "mine",
        "source": {"kind": "urls", "files": [str(tmp_path / "pairs.csv")]},
        "acquire": {
            "shard_size": 4,
            "fetch": {"contact": "me@a.example", "allow_hosts": [address], "timeout_s": 100, "attempts": 1},
            "image": {"size_px": 64},
        },
        "models": {},
        "execution": {"cpus": 2, "acquire_tasks": 2},
        "store": str(tmp_path / "store"),
        "state_dir": str(tmp_path / "state"),
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def start(recipe: Path) -> subprocess.Popen[str]:
    command = ["env", "--default-signal=INT,TERM", sys.executable, "-m", "pipelines.cli", "run", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=recipe.parent, env=environment
    )


def ended(process: subprocess.Popen[str], known: list[psutil.Process]) -> str:
    """What it said after it was told to end. It leaves nobody behind."""
    out, _ = process.communicate(timeout=50)  # a second or two; who waits for the server takes a hundred
    assert process.returncode == 130, out
    assert "Traceback" not in out
    _, alive = psutil.wait_procs(known, timeout=10)
    assert alive == []
    return out


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_waits_for_a_slow_server_ends_at_once_and_can_be_resumed(
    number: signal.Signals, server: Server, recipe: Path
) -> None:
    process = start(recipe)
    for _ in range(6):
        assert server.asked.acquire(timeout=120)
    units = recipe.parent / "store" / "acquire" / "units"
    deadline_s = time.monotonic() + 60
    while not list(units.glob("*/record.json")) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    finished = list(units.glob("*/record.json"))
    assert finished
    known = descendants(process)
    process.send_signal(number)
    out = ended(process, known)
    assert out.splitlines()[-1] == MESSAGE
    assert out.count("error") == out.count("interrupted") == 1
    server.go_on.set()
    again = start(recipe)
    out, _ = again.communicate(timeout=200)
    assert again.returncode == 0, out
    assert "4 of 16 URLs are done already" in out
    assert all(path.is_file() for path in finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("line", ["log: ", "starting Ray", "acquire: started"])
def test_a_run_that_has_just_begun_ends_as_well(number: signal.Signals, line: str, recipe: Path) -> None:
    process = start(recipe)
    assert process.stdout is not None
    while not process.stdout.readline().startswith(line):
        assert process.poll() is None
    known = descendants(process)
    process.send_signal(number)
    assert ended(process, known).splitlines()[-1] == MESSAGE


def test_a_second_ctrl_c_ends_at_once(server: Server, recipe: Path) -> None:
    process = start(recipe)
    for _ in range(6):
        assert server.asked.acquire(timeout=120)
    known = descendants(process)
    deadline_s = time.monotonic() + 50
    while process.poll() is None and time.monotonic() < deadline_s:
        process.send_signal(signal.SIGINT)
        time.sleep(1.2)
    ended(process, known)


def test_ctrl_c_in_training_leaves_everything_resumable(tmp_path: Path) -> None:
    recipe = TinyRecipe(tmp_path, free_port())
    process = recipe.start("--until", "train.autoencoder")
    deadline_s = time.monotonic() + 200
    while not any(Path(recipe.store).glob("train.autoencoder/unfinished/**/manifest.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    known = descendants(process)
    process.send_signal(signal.SIGINT)
    assert ended(process, known).splitlines()[-1] == MESSAGE
    plan = recipe.ldm("--dry-run").stdout
    states = {line.split()[0]: line for line in plan.splitlines() if line.strip()}
    assert "up to date" in states["select"]
    assert "to do" in states["train.autoencoder"]
