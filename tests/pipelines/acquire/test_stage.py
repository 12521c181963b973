"""The whole stage over the gallery, on a real local Ray: the account, resuming, and a driver that is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.storage import Store
from pipelines.acquire.errors import NoImages, ShardFailed, SourceError
from pipelines.acquire.sources.gallery import gallery_of
from pipelines.acquire.stage import acquire, identity
from pipelines.artifacts import Artifact
from pipelines.gallery.links import GalleryError, Link
from pipelines.recipe import AcquireSpec, Execution, Fetch, GallerySource, ImageFormat, PairFilter, UrlsSource

LIMIT = 60
FAULT_RATE = 0.9
SHARD_SIZE = 20
REASONS = {
    Link.MISSING: "not_found",
    Link.GONE: "not_found",
    Link.TRUNCATED: "truncated",
    Link.PAGE: "not_an_image",
    Link.PRIVATE: "address_not_allowed",
    Link.BOMB: "too_many_pixels",
    Link.NO_ROBOTS: "opt_out",
    Link.NO_MINING: "opt_out",
    Link.NO_TRAINING: "opt_out",
    Link.NO_SIGNAL: "opt_out",
}
DRIVER = """
import sys
from infra.cluster import ClusterSpec, cluster
from infra.storage import Store
from pipelines.acquire.stage import acquire
from pipelines.recipe import AcquireSpec, Execution, GallerySource
from pipelines.reporting import LogReport
spec, source, store = sys.argv[1:]
with cluster(ClusterSpec(num_cpus=1, object_store_bytes=80 * 2**20, forward_output=False)):
    acquire(AcquireSpec.model_validate_json(spec), GallerySource.model_validate_json(source), {}, Store(store),
            LogReport(), Execution(acquire_tasks=1))
"""


def spec_for(port: int, **changes: Any) -> AcquireSpec:
    fetch = Fetch(
        timeout_s=4.0,
        attempts=2,
        max_bytes=1_000_000,
        max_pixels=4_000_000,
        allow_hosts=(f"127.0.0.1:{port}",),
        threads=8,
    )
    image = ImageFormat(size_px=64, resize_mode="border", encode_format="png", encode_quality=6)
    settings = {
        "shard_size": SHARD_SIZE,
        "fetch": fetch,
        "image": image,
        "filter": PairFilter(min_side_px=32),
        **changes,
    }
    return AcquireSpec(**settings)


@pytest.fixture(scope="module")
def source(free_port: int) -> GallerySource:
    return GallerySource(kind="gallery", port=free_port, limit=LIMIT, fault_rate=FAULT_RATE)


@pytest.fixture(scope="module")
def spec(free_port: int) -> AcquireSpec:
    return spec_for(free_port)


@pytest.fixture(scope="module")
def made(
    local_ray: None, spec: AcquireSpec, source: GallerySource, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, Artifact]:
    from pipelines.reporting import LogReport

    store = Store(tmp_path_factory.mktemp("made"))
    return store, acquire(spec, source, {}, store, LogReport(), Execution(acquire_tasks=2))


def ledger(store: Store, artifact: Artifact) -> pa.Table:
    return pa.concat_tables(pq.read_table(store.open(unit.only(".parquet"))) for unit in artifact.units)


def tars(store: Store, artifact: Artifact) -> list[bytes]:
    return [store.read_bytes(unit.only(".tar")) for unit in artifact.units]


def records(store: Store) -> dict[str, float]:
    """When each unit was published, by its key."""
    paths = Path(store.root).glob("acquire/units/*/record.json")
    return {path.parent.name: path.stat().st_mtime for path in paths}


def test_the_account_of_the_gallery(made: tuple[Store, Artifact], source: GallerySource) -> None:
    store, artifact = made
    gallery = gallery_of(source)
    rows = ledger(store, artifact)
    assert rows["url"].to_pylist() == gallery.table()["url"].to_pylist()
    expected = [REASONS.get(link) for link, _ in gallery.links()]
    assert rows["reason"].to_pylist() == expected
    assert set(expected) == {None, *REASONS.values()}
    counts = artifact.counts
    assert (counts.total, counts.kept) == (len(expected), expected.count(None))
    assert counts.dropped == {
        reason: expected.count(reason) for reason in ("address_not_allowed", "opt_out", "too_many_pixels")
    }
    assert counts.failed == {reason: expected.count(reason) for reason in ("not_an_image", "not_found", "truncated")}
    names = [unit.info["shard"] for unit in artifact.units]
    assert len(set(names)) == len(names)
    assert [[entry.name for entry in unit.files] for unit in artifact.units] == [
        [f"{name}.parquet", f"{name}.tar"] for name in names
    ]
    assert {unit.counts.total for unit in artifact.units[:-1]} == {SHARD_SIZE}
    by_kind = {str(row["url"]).split("/")[3]: row for row in rows.to_pylist()}
    assert by_kind["sideways"]["orientation"] == 6
    assert by_kind["flaky"]["attempts"] == 2
    assert by_kind["moved-twice"]["final_url"].split("/")[3] == "plain"
    assert by_kind["plain"]["name"] + ", " in by_kind["plain"]["caption"]
    assert by_kind["plain"]["licence"] in {"Apache-2.0", "CC-BY-4.0"}


def test_what_is_there_is_returned_without_being_fetched(
    made: tuple[Store, Artifact], spec: AcquireSpec, source: GallerySource, report: Any, free_port: int
) -> None:
    store, artifact = made
    with socket.create_server(("127.0.0.1", free_port)):  # the gallery couldn't even be opened
        again = acquire(spec, source, {}, store, report, Execution(acquire_tasks=1))
    assert again.revision == artifact.revision
    more_threads = spec.model_copy(update={"fetch": spec.fetch.model_copy(update={"threads": 3})})
    assert identity(more_threads, source).content == identity(spec, source).content
    assert report.steps == []


def test_only_missing_shards_are_made(
    made: tuple[Store, Artifact], spec: AcquireSpec, source: GallerySource, report: Any, tmp_path: Path
) -> None:
    import shutil

    store, artifact = made
    copy = Store(tmp_path / "copy")
    shutil.copytree(store.root, copy.root)
    copy.delete(f"acquire/keys/{artifact.key}.json")
    copy.delete(f"acquire/units/{artifact.units[1].key}/record.json")
    before = records(copy)
    again = acquire(spec, source, {}, copy, report, Execution())
    assert {key: stamp for key, stamp in records(copy).items() if key in before} == before
    assert tars(copy, again) == tars(store, artifact)
    assert [unit.info["content"] for unit in again.units] == [unit.info["content"] for unit in artifact.units]
    done = [step[0] for step in report.steps]
    total = artifact.counts.total
    assert done == [total - SHARD_SIZE, total]
    assert {step[1:3] for step in report.steps} == {(total, "URLs")}
    assert report.values["urls/kept"] == artifact.counts.kept
    assert report.values["urls/failed/not_found"] == artifact.counts.failed["not_found"]
    assert report.values["images_per_s"] > 0
    assert any("done already" in note for note in report.notes)


@pytest.mark.slow  # the kill test of the whole run has acquire in it, too
def test_a_killed_driver_leaves_nothing_to_repair(
    made: tuple[Store, Artifact], spec: AcquireSpec, source: GallerySource, report: Any, tmp_path: Path
) -> None:
    undisturbed, artifact = made
    store = Store(tmp_path / "killed")
    arguments = [spec.model_dump_json(), source.model_dump_json(), store.url]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline_s = time.monotonic() + 90
    while not records(store) and time.monotonic() < deadline_s:
        assert driver.poll() is None, "the driver ended before it could be killed"
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = records(store)
    assert 0 < len(before) < len(artifact.units)
    assert not store.listdir("acquire/keys")
    again = acquire(spec, source, {}, store, report, Execution(acquire_tasks=2))
    assert tars(store, again) == tars(undisturbed, artifact)
    assert again.counts == artifact.counts
    assert [unit.key for unit in again.units] == [unit.key for unit in artifact.units]
    kept = {key: stamp for key, stamp in records(store).items() if key in before}
    assert kept == before


def test_a_port_in_use(
    local_ray: None, spec: AcquireSpec, source: GallerySource, report: Any, tmp_path: Path, free_port: int
) -> None:
    store = Store(tmp_path / "store")
    with socket.create_server(("127.0.0.1", free_port)), pytest.raises(GalleryError, match="in use"):
        acquire(spec, source, {}, store, report, Execution())
    assert not store.listdir("acquire/keys")


def test_the_gallery_must_be_allowed(source: GallerySource, report: Any, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"allow_hosts \[\] doesn't name"):
        acquire(AcquireSpec(), source, {}, Store(tmp_path), report, Execution())


def test_a_wrong_allow_list_is_told_before_anything_starts(source: GallerySource, report: Any, tmp_path: Path) -> None:
    spec = AcquireSpec(fetch=Fetch(allow_hosts=("127.0.0.1",)))
    with pytest.raises(SourceError, match=r"'127\.0\.0\.1' is not host:port"):
        acquire(spec, source, {}, Store(tmp_path), report, Execution())


def test_knowing_what_is_to_do_takes_no_heavy_library() -> None:
    script = (
        "import sys, pipelines.acquire.stage; print({'ray', 'img2dataset', 'cv2', 'torch', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_no_images_publish_no_artifact(local_ray: None, report: Any, tmp_path: Path) -> None:
    urls = ["http://127.0.0.1/a.png", "file:///etc/passwd", "http://10.0.0.1/b.png"]
    pq.write_table(pa.table({"url": urls, "caption": ["a cat", "b", "c"]}), tmp_path / "list.parquet")
    source = UrlsSource(kind="urls", files=(str(tmp_path / "list.parquet"),))
    store = Store(tmp_path / "store")
    with pytest.raises(NoImages, match=r"none of 3 URLs.*address_not_allowed 2, scheme_not_allowed 1.*/\w+\.parquet"):
        acquire(AcquireSpec(), source, {}, store, report, Execution())
    assert not store.listdir("acquire/keys")


def test_a_shard_that_cannot_be_published(local_ray: None, report: Any, tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://127.0.0.1/a.png"], "caption": ["a cat"]}), tmp_path / "list.parquet")
    source = UrlsSource(kind="urls", files=(str(tmp_path / "list.parquet"),))
    store = Store(tmp_path / "store")
    store.publish_bytes("acquire/units", b"a file where a folder is to be")
    with pytest.raises(ShardFailed, match=r"shard [0-9a-f]{16} could not be made: .*can't write"):
        acquire(AcquireSpec(), source, {}, store, report, Execution())
