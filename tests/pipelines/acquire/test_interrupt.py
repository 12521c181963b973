"""A shard that is given up while servers keep it waiting: it ends at once, and asks for nothing more."""

from __future__ import annotations

import _thread
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from infra.storage import Store
from pipelines.acquire import scratch
from pipelines.acquire.download import import_downloader
from pipelines.acquire.shard import ShardTask, acquire_shard
from pipelines.dataset.uid import make_uid
from pipelines.recipe import AcquireSpec, Fetch

THREADS = 4
NUM_ROWS = 40
HELD_S = 60.0


class Holding:
    """A server that keeps everybody waiting until it is released."""

    def __init__(self, hostile: Any) -> None:
        self.released = threading.Event()
        self.asked = 0
        pairs = [(hostile.url(f"/{n}", self._answer), f"picture {n}") for n in range(NUM_ROWS)]
        columns = {"url": [url for url, _ in pairs], "caption": [caption for _, caption in pairs]}
        self.rows = pa.table(columns | {"uid": [make_uid(*pair) for pair in pairs]})
        fetch = Fetch(timeout_s=HELD_S, attempts=5, threads=THREADS, allow_hosts=(hostile.host,))
        self.spec = AcquireSpec(fetch=fetch)

    def _answer(self, peer: socket.socket, _: int) -> None:
        self.asked += 1
        self.released.wait(HELD_S)
        peer.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")

    def task(self, store: Store) -> ShardTask:
        return ShardTask("one", "unit", self.rows, self.spec, store)

    def wait_until_asked(self) -> None:
        deadline_s = time.monotonic() + HELD_S
        while self.asked < THREADS and time.monotonic() < deadline_s:
            time.sleep(0.02)
        assert self.asked == THREADS

    def expect_no_more(self) -> None:
        """Released, those under way end, and nobody comes back."""
        self.released.set()
        time.sleep(1.0)
        assert self.asked == THREADS


@pytest.fixture
def holding(hostile: Any) -> Holding:
    return Holding(hostile)


def downloads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "download"]


def test_an_interruption_ends_a_shard_at_once(
    holding: Holding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    theirs = import_downloader().download_image_with_retry
    interrupted_s: list[float] = []

    def interrupt() -> None:
        holding.wait_until_asked()
        interrupted_s.append(time.monotonic())
        _thread.interrupt_main()  # as Ray cancels a task: no signal is sent that would end a wait

    threading.Thread(target=interrupt, daemon=True).start()
    store = Store(tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        acquire_shard(holding.task(store))
    assert time.monotonic() - interrupted_s[0] < HELD_S / 10
    assert store.listdir("acquire/units") == []
    assert not list(tmp_path.glob(f"{scratch.PREFIX}*"))
    holding.expect_no_more()
    for thread in downloads():
        thread.join(HELD_S / 10)
    assert downloads() == []
    assert import_downloader().download_image_with_retry is theirs


def test_a_store_that_cannot_be_written_ends_it_too(hostile: Any, tmp_path: Path) -> None:
    """The first row that can't be written ends the others' wait, however many there are."""
    urls = [hostile.url(f"/{n}", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n") for n in range(200)]
    rows = pa.table({"url": urls, "caption": ["a"] * 200, "uid": [str(n) for n in range(200)]})
    spec = AcquireSpec(fetch=Fetch(threads=2, allow_hosts=(hostile.host,)))
    from pipelines.acquire import write

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(write.ShardWriter, "add", full)
        with pytest.raises(OSError, match="No space left"):
            acquire_shard(ShardTask("one", "unit", rows, spec, Store(tmp_path / "store")))
    assert len(hostile.requests) < 20


def test_a_cancelled_task_leaves_its_worker_free(local_ray: None, holding: Holding, tmp_path: Path) -> None:
    """On a cluster that lives on, as `infra.tasks.bounded` closed does."""
    import ray

    store = Store(tmp_path / "store")
    remote = ray.remote(num_cpus=2, max_retries=0)(acquire_shard)
    reference = remote.remote(holding.task(store))
    holding.wait_until_asked()
    ray.cancel(reference)
    cancelled_s = time.monotonic()
    with pytest.raises((ray.exceptions.TaskCancelledError, ray.exceptions.RayTaskError)):
        ray.get(reference, timeout=HELD_S)
    # Both CPUs are free again for the next.
    assert ray.get(ray.remote(num_cpus=2)(lambda: 7).remote(), timeout=HELD_S) == 7
    assert time.monotonic() - cancelled_s < HELD_S / 2
    holding.expect_no_more()
    assert store.listdir("acquire/units") == []
