"""The cache of remote files: who waits for whom, what goes first, and who may look into it."""

from __future__ import annotations

import hashlib
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.file_cache import FileCache
from infra.store_errors import StorageError


def fetch(cache: FileCache, name: str, size_bytes: int = 1000) -> Path:
    local = cache.path("s3://bucket", name)
    cache.fetch(local, name, lambda to: to.write_bytes(bytes(size_bytes)) and None, size_bytes, None)
    return local


def set_back(local: Path, seconds: float) -> None:
    """As if it had been used that long ago."""
    os.utime(local, (time.time() - seconds, local.stat().st_mtime))


def scratch(cache: FileCache) -> list[Path]:
    return [*(cache.root / "incoming").iterdir(), *(cache.root / "locks").iterdir()]


def test_one_downloads_and_the_others_wait(caplog: pytest.LogCaptureFixture) -> None:
    downloads = []

    def download(to: Path) -> None:
        downloads.append(to)
        with to.open("wb") as file:
            file.write(b"first half")
            time.sleep(0.2)
            file.write(b"second half")

    def read(_: int) -> bytes:
        cache = FileCache()
        local = cache.path("s3://bucket", "file")
        cache.fetch(local, "s3://bucket/file", download, None, None)
        return local.read_bytes()

    caplog.set_level("INFO")
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(read, range(8))) == {b"first halfsecond half"}
    assert len(downloads) == 1
    assert "waiting for another process, which fetches s3://bucket/file" in caplog.text
    assert scratch(FileCache()) == []


HOLDER = """
import time
from infra.file_cache import FileCache

def download(to):
    to.write_bytes(b"half")
    print("downloading", flush=True)
    time.sleep(600)

cache = FileCache()
cache.fetch(cache.path("s3://bucket", "file"), "file", download, None, None)
"""


def test_a_killed_download_is_begun_anew_by_who_waits() -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert holder.stdout is not None
    assert holder.stdout.readline() == "downloading\n"
    cache = FileCache()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fetch, cache, "file", 5)
        time.sleep(0.2)
        assert not waiting.done()
        holder.kill()
        holder.wait()
        holder.stdout.close()
        assert waiting.result(timeout=30).read_bytes() == bytes(5)
    assert scratch(cache) == []


def test_what_killed_processes_left_is_removed_by_the_next_download() -> None:
    cache = FileCache()
    (cache.root / "incoming" / "abandoned").write_bytes(b"half")
    fetch(cache, "file")
    assert scratch(cache) == []


def test_a_failed_download_leaves_nothing() -> None:
    cache = FileCache()
    local = cache.path("s3://bucket", "file")

    def fail(to: Path) -> None:
        to.write_bytes(b"half")
        raise ConnectionError("reset")

    with pytest.raises(ConnectionError):
        cache.fetch(local, "file", fail, None, None)
    assert not local.exists()
    assert scratch(cache) == []
    assert fetch(cache, "file").exists()


@pytest.mark.parametrize("size_bytes", [None, 4])
def test_a_copy_that_is_not_what_was_recorded_is_made_anew(size_bytes: int | None) -> None:
    cache, downloads = FileCache(), []
    local, sha256 = cache.path("s3://bucket", "file"), hashlib.sha256(b"good").hexdigest()

    def read() -> bytes:
        cache.fetch(local, "file", lambda to: downloads.append(to.write_bytes(b"good")), size_bytes, sha256)
        return local.read_bytes()

    assert read() == read() == b"good"
    assert len(downloads) == 1
    for other in (b"gooe", b"goo", b""):
        local.write_bytes(other)
        assert read() == b"good"
    assert len(downloads) == 4
    assert scratch(cache) == []


def test_what_was_not_used_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTWORKS_CACHE_GB", "0.0000035")  # three of them, and a half
    cache = FileCache()
    paths = {name: fetch(cache, name) for name in ("unit/a", "unit/b", "c")}
    for age_s, name in ((3000, "unit/a"), (2000, "unit/b"), (1000, "c")):
        set_back(paths[name], age_s)
    fetch(cache, "unit/a")  # used again: now b is the oldest
    fetch(cache, "d")
    assert {name: path.exists() for name, path in paths.items()} == {"unit/a": True, "unit/b": False, "c": True}
    set_back(paths["unit/a"], 4000)
    fetch(cache, "e")
    assert not paths["unit/a"].parent.exists(), "an empty folder goes too"


def test_what_is_in_use_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTWORKS_CACHE_GB", "0")
    cache = FileCache()
    just_fetched, mapped = fetch(cache, "just fetched"), fetch(cache, "mapped")
    with mapped.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        set_back(mapped, 3000)
        fetch(cache, "next")
        assert just_fetched.exists()
        assert not mapped.exists()
        assert view[:] == bytes(1000)


def test_a_file_that_is_being_fetched_again_is_not_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long download of a file whose old copy has another size."""
    monkeypatch.setenv("LATENTWORKS_CACHE_GB", "0")
    cache = FileCache()
    local = fetch(cache, "file")
    set_back(local, 3000)
    began, goes_on = threading.Event(), threading.Event()

    def download(to: Path) -> None:
        began.set()
        assert goes_on.wait(30)
        to.write_bytes(bytes(7))

    with ThreadPoolExecutor(1) as pool:
        fetching = pool.submit(cache.fetch, local, "file", download, 7, None)
        assert began.wait(30)
        fetch(cache, "other")
        assert local.exists()
        goes_on.set()
        fetching.result(timeout=30)
    assert local.read_bytes() == bytes(7)


def test_without_a_bound_it_takes_a_tenth_of_the_free_space(monkeypatch: pytest.MonkeyPatch) -> None:
    from infra import file_cache

    usage = type(file_cache.shutil.disk_usage("/"))
    monkeypatch.setattr(file_cache.shutil, "disk_usage", lambda _: usage(10**6, 0, 18_000))
    cache = FileCache()
    old = [fetch(cache, str(index)) for index in range(2)]
    for local in old:
        set_back(local, 3000)
    fetch(cache, "new")  # three files and 18,000 free bytes: a tenth is two files
    assert [local.exists() for local in old].count(True) == 1


@pytest.mark.parametrize("size", ["fifty", "-1", "nan", "inf"])
def test_a_bound_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setenv("LATENTWORKS_CACHE_GB", size)
    with pytest.raises(StorageError, match=f"LATENTWORKS_CACHE_GB is '{size}'; give the cache's size in GB"):
        FileCache()


@pytest.fixture
def shared_temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("LATENTWORKS_CACHE")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_in_the_shared_temporary_folder_it_is_closed_to_others(shared_temp: Path) -> None:
    root = FileCache().root
    assert root.parent == shared_temp
    root.chmod(0o777)
    assert FileCache().root.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_somebody_else_has_put_there_is_refused(
    shared_temp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = shared_temp / "elsewhere"
    elsewhere.mkdir()
    root = shared_temp / f"latentworks-cache-{os.getuid()}"
    root.symlink_to(elsewhere)
    with pytest.raises(StorageError, match="name a folder of your own with LATENTWORKS_CACHE"):
        FileCache()
    assert list(elsewhere.iterdir()) == []
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(StorageError, match=f"belongs to user {other - 1}"):
        FileCache()


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LATENTWORKS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match=r"file/cache can't be used: .*LATENTWORKS_CACHE"):
        FileCache()
