"""Ctrl-C: one message, exit code 130, and what was finished is there for the next run."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from tiny import TinyRecipe, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def test_ctrl_c_in_training_leaves_everything_resumable(tmp_path: Path) -> None:
    recipe = TinyRecipe(tmp_path, free_port())
    process = recipe.start("--until", "train.autoencoder")
    deadline_s = time.monotonic() + 200
    while not any(Path(recipe.store).glob("train.autoencoder/unfinished/**/manifest.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "run the same command again" in out
    assert "Traceback" not in out
    plan = recipe.ldm("--dry-run").stdout
    states = {line.split()[0]: line for line in plan.splitlines() if line.strip()}
    assert "up to date" in states["select"]
    assert "to do" in states["train.autoencoder"]
