"""kill -9 of the driver in every stage, then the same command: what comes out equals an undisturbed run's."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from tiny import STAGES, TinyRecipe, free_port

from infra.storage import Store
from pipelines.artifacts import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


# In which state of the store each stage is killed: (stage, what must be there, what must not be there yet).
MOMENTS = {
    "acquire": ("acquire/units/*/record.json", "acquire/keys/*.json"),
    "train.clip": ("train.clip/unfinished/**/manifest.json", "train.clip/keys/*.json"),
    "score": ("score/units/*/record.json", "score/keys/*.json"),
    "select": ("score/keys/*.json", "select/keys/*.json"),
    "report": ("select/keys/*.json", "report/keys/*.json"),
    "train.autoencoder": ("train.autoencoder/unfinished/**/manifest.json", "train.autoencoder/keys/*.json"),
    "encode.base": ("train.autoencoder/keys/*.json", "encode.base/keys/*.json"),
    "train.base": ("train.base/unfinished/**/manifest.json", "train.base/keys/*.json"),
    "evaluate.base": ("train.base/keys/*.json", "evaluate.base/keys/*.json"),
    "release": ("evaluate.base/keys/*.json", "release/keys/*.json"),
}


def test_killed_in_every_stage_ends_as_if_undisturbed(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "calm").mkdir()
    (tmp_path / "killed").mkdir()
    calm, killed = TinyRecipe(tmp_path / "calm", port), TinyRecipe(tmp_path / "killed", port)
    done = calm.ldm()
    assert done.returncode == 0, done.stdout

    for stage, moment in MOMENTS.items():
        process = killed.start()
        _wait_for(Path(killed.store), stage, *moment, process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"{stage} was over before it could be killed"
    done = killed.ldm()
    assert done.returncode == 0, done.stdout
    _expect_equal(calm, killed)


def _wait_for(store: Path, stage: str, present: str, absent: str, process) -> None:
    deadline_s = time.monotonic() + 240
    while not any(store.glob(present)):
        assert process.poll() is None, f"the run ended before {stage} could be killed: {process.communicate()[0]}"
        assert time.monotonic() < deadline_s, f"{present} did not appear"
        time.sleep(0.002)
    assert not any(store.glob(absent)), f"{stage} had ended before it could be killed"


def _expect_equal(calm, killed) -> None:
    """The same shards, selection, cache, and models trained on the same samples in the same order, to the last bit."""
    expected, actual = calm.status(), killed.status()
    assert {stage: node["state"] for stage, node in actual.items()} == dict.fromkeys(STAGES, "up to date")
    assert _tars(calm, expected) == _tars(killed, actual)
    for stage in STAGES:
        assert actual[stage]["counts"] == expected[stage]["counts"], stage
        assert actual[stage]["revision"] == expected[stage]["revision"], stage


def _tars(recipe, nodes) -> dict[str, str]:
    artifact = load(Store(recipe.store), "acquire", nodes["acquire"]["revision"])
    return {entry.name: entry.sha256 for unit in artifact.units for entry in unit.files if entry.name.endswith(".tar")}
