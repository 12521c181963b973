"""`encode` on a local Ray cluster: several workers, their errors, and the death of one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from infra.cluster import ClusterError
from infra.storage import Store
from pipelines.dataset.cache import open_cache
from pipelines.dataset.errors import UnusableImage
from pipelines.dataset.facts import CacheFacts
from pipelines.encode import stage
from pipelines.recipe import Execution, Predicate, TextToImageModel

pytestmark = pytest.mark.usefixtures("local_ray")


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any("ray::ShardEncoder" in part for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed(
    published: Any, store: Store, model: TextToImageModel, report: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    acquired = published.acquire()
    inputs = {"acquire": acquired, "select": published.select(acquired), "train.autoencoder": published.autoencoder()}
    killed: list[int] = []

    class Killing(type(report)):  # type: ignore[misc]
        def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
            super().progress(done, total, unit, note)
            if not note and not killed:  # the first shards are being encoded
                killed.extend(process.pid for process in workers()[:1])
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

    told = Killing()
    artifact = stage.encode("base", model, inputs, store, told, Execution(device="cpu", encode_workers=2))
    assert killed
    assert artifact.counts.kept == inputs["select"].counts.kept
    ended_by_s = time.monotonic() + 20  # Ray ends them after it was told to, not at once
    while workers() and time.monotonic() < ended_by_s:
        time.sleep(0.1)
    assert workers() == []

    fewer = inputs | {
        "select": published.select(acquired, where=(Predicate(name="less", column="key", op="!=", value="000000005"),))
    }
    copied = stage.encode("base", model, fewer, store, report, Execution(device="cpu", encode_workers=2))
    assert sum(CacheFacts.of(unit).computed for unit in copied.units[:-1] if unit not in artifact.units) == 0
    assert copied.counts.kept == artifact.counts.kept - 1

    request.getfixturevalue("in_process")
    elsewhere = type(published)(Store(tmp_path / "other"), tmp_path / "other-networks")
    acquired = elsewhere.acquire()
    inputs = {"acquire": acquired, "select": elsewhere.select(acquired), "train.autoencoder": elsewhere.autoencoder()}
    alone = stage.encode("base", model, inputs, elsewhere.store, report, Execution(device="cpu"))
    for unit, same in zip(artifact.units[:-1], alone.units[:-1], strict=True):
        assert unit.key == same.key
        one, other = (
            open_cache(store.fetch(unit.only(".arrow"))),
            open_cache(elsewhere.store.fetch(same.only(".arrow"))),
        )
        assert one.strings("uid") == other.strings("uid")
        np.testing.assert_allclose(np.concatenate(one.moments()), np.concatenate(other.moments()), atol=2e-3)


def test_a_worker_s_error_is_told_as_it_is(published: Any, store: Store, model: TextToImageModel, report: Any) -> None:
    acquired = published.acquire((8,), spoil="000000005")
    inputs = {"acquire": acquired, "select": published.select(acquired), "train.autoencoder": published.autoencoder()}
    with pytest.raises(UnusableImage) as caught:
        stage.encode("base", model, inputs, store, report, Execution(device="cpu"))
    assert str(caught.value).startswith("image '000000005' of ")
    assert "Traceback" not in str(caught.value)
    with pytest.raises(ClusterError, match="no GPU"):
        stage.encode("base", model, inputs, store, report, Execution(device="cuda"))
