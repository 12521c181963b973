"""`ldm ui`: both pages answer on loopback, end together, and what goes wrong is one message."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import TinyRecipe, free_port

from pipelines.commands.ui import UiError, show
from pipelines.recipe.file import load_recipe


def test_a_taken_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    recipe = load_recipe("quickstart", [f"state_dir={tmp_path}"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UiError, match=f"port {port} for MLflow is taken .*--mlflow-port"):
            show(recipe, free_port(), port, print)
    free = free_port()
    with pytest.raises(UiError, match="both pages can't have port"):
        show(recipe, free, free, print)


@pytest.fixture
def pages(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A running `ldm ui`, with the ports of Dagster and MLflow."""
    recipe = TinyRecipe(tmp_path, free_port())
    ports = free_port(), free_port()
    options = ["--dagster-port", str(ports[0]), "--mlflow-port", str(ports[1])]
    command = ["env", "--default-signal=INT", sys.executable, "-m", "pipelines.cli", "ui", "quickstart"]
    process = subprocess.Popen(
        [*command, *recipe.arguments(*options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    shown = [process.stdout.readline() for _ in range(3)]
    assert [line.split()[0] for line in shown] == ["Dagster", "MLflow", "logs"], shown
    yield process, *ports
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def graphql(port: int, query: str) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql", json.dumps({"query": query}).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["data"]


@pytest.mark.slow
def test_both_pages_answer_and_end_with_ctrl_c(pages: tuple[subprocess.Popen[str], int, int]) -> None:
    process, dagster_port, mlflow_port = pages
    assets = graphql(dagster_port, "{assetNodes{assetKey{path} dependencyKeys{path}}}")["assetNodes"]
    inputs = {node["assetKey"]["path"][0]: {key["path"][0] for key in node["dependencyKeys"]} for node in assets}
    assert {"acquire", "select", "train_autoencoder", "release"} <= set(inputs)
    assert "acquire" in inputs["select"]
    with urllib.request.urlopen(f"http://127.0.0.1:{mlflow_port}/", timeout=30) as answer:
        assert b"MLflow" in answer.read()

    children = psutil.Process(process.pid).children(recursive=True)
    listening = {
        found.laddr
        for child in children
        for found in child.net_connections(kind="tcp")
        if found.status == psutil.CONN_LISTEN
    }
    assert {(address.ip, address.port) for address in listening} >= {("127.0.0.1", dagster_port)}
    assert {address.ip for address in listening} <= {"127.0.0.1", "::1"}
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    _, alive = psutil.wait_procs(children, timeout=5)
    assert alive == []


@pytest.mark.slow
def test_a_page_that_dies_ends_the_other_and_is_named(pages: tuple[subprocess.Popen[str], int, int]) -> None:
    process, *_ = pages
    children = psutil.Process(process.pid).children()
    (mlflow,) = (child for child in children if "mlflow" in child.cmdline())
    mlflow.kill()
    started_s = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: MLflow ended by itself by signal 9" in out
    assert "ui-mlflow.log" in out
    assert time.monotonic() - started_s < 30
    assert psutil.wait_procs(children, timeout=5)[1] == []
