"""kill -9 of one training rank: the run goes on by itself from the last checkpoint, and ends as if undisturbed."""

from __future__ import annotations

import time
from pathlib import Path

import psutil
import pytest
from tiny import TinyRecipe, free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NODE = "train.autoencoder"


def test_a_killed_rank_is_replaced_and_the_result_is_the_same(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "calm").mkdir()
    (tmp_path / "killed").mkdir()
    calm, killed = TinyRecipe(tmp_path / "calm", port), TinyRecipe(tmp_path / "killed", port)
    for recipe in (calm, killed):
        recipe.settings |= {"models.autoencoder.train.steps": 60, "execution.ranks": 2}
    done = calm.ldm("--until", NODE)
    assert done.returncode == 0, done.stdout

    process = killed.start("--until", NODE)
    deadline_s = time.monotonic() + 300
    while not any(Path(killed.store).glob(f"{NODE}/unfinished/**/manifest.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    ranks = [
        child for child in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in child.name()
    ]
    assert len(ranks) == 2, [child.name() for child in psutil.Process(process.pid).children(recursive=True)]
    ranks[-1].kill()
    assert not any(Path(killed.store).glob(f"{NODE}/keys/*.json")), "it had ended before"
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    assert killed.status()[NODE]["revision"] == calm.status()[NODE]["revision"]
