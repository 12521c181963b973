"""Stores on the local disk and in S3: whole files or none, and one clear message where something is wrong."""

from __future__ import annotations

import hashlib
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from infra.storage import FileDamaged, StorageError, Store, StoreUnwritable


@dataclass(frozen=True)
class Entry:
    """A file of a unit, as a manifest records it."""

    name: str
    size_bytes: int
    sha256: str


def published(store: Store, folder: str, contents: dict[str, bytes]) -> list[Entry]:
    for name, content in contents.items():
        store.publish_bytes(f"{folder}/{name}", content)
    return [Entry(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()]


def test_what_is_published_is_read_back(store: Store, tmp_path: Path) -> None:
    store.publish_bytes("a/b.bin", b"one")
    source = tmp_path / "source"
    source.write_bytes(b"two")
    store.publish_file("a/c.bin", source)
    assert store.read_bytes("a/b.bin") == b"one"
    assert store.open("a/c.bin").read() == b"two"
    assert store.listdir("a") == ["b.bin", "c.bin"]
    assert store.listdir("nowhere") == []
    assert store.exists("a/b.bin")
    assert not store.exists("a/d.bin")


def test_publishing_again_replaces_the_whole(store: Store) -> None:
    store.publish_bytes("pointer", b"a long first value")
    store.publish_bytes("pointer", b"short")
    assert store.read_bytes("pointer") == b"short"


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    store = Store(tmp_path)
    versions = [bytes([value]) * 200_000 for value in (1, 2)]
    store.publish_bytes("file", versions[0])
    seen: set[bytes] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(store.read_bytes("file"))

    reader = threading.Thread(target=read)
    reader.start()
    for index in range(50):
        store.publish_bytes("file", versions[index % 2])
    stop.set()
    reader.join()
    assert seen <= set(versions)


def test_create_lets_exactly_one_win(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda value: store.create("one", bytes([value])), range(8)))
    assert won.count(True) == 1
    assert store.read_bytes("one") == bytes([won.index(True)])


def test_delete_takes_folders_and_nothing(store: Store) -> None:
    store.publish_bytes("a/b/c", b"x")
    store.delete("a")
    store.delete("a")
    assert not store.exists("a/b/c")


def test_fetch_keeps_a_folder_together(store: Store) -> None:
    store.publish_bytes("m/unet/config.json", b"{}")
    store.publish_bytes("m/unet/weights", b"w")
    paths = [store.fetch("m/unet/config.json"), store.fetch("m/unet/weights")]
    assert paths[0].parent == paths[1].parent
    assert [path.read_bytes() for path in paths] == [b"{}", b"w"]
    with pytest.raises(FileNotFoundError):
        store.fetch("m/unet/absent")


def test_sizes_are_of_all_files_under_a_folder(store: Store) -> None:
    for path, size in {
        "a/b/one": 1,
        "a/two": 20,
        "a/c/d/empty": 0,
        "ab/elsewhere": 7,
        "a.part": 3,
        "a/x.part": 3,
    }.items():
        store.publish_bytes(path, bytes(size))
    assert store.sizes("a") == {"b/one": 1, "c/d/empty": 0, "two": 20}
    assert store.sizes("a/b") == {"one": 1}
    assert store.sizes("") == {"a/b/one": 1, "a/c/d/empty": 0, "a/two": 20, "ab/elsewhere": 7}
    assert store.sizes("nowhere") == {}
    assert store.sizes("a/two") == {}, "a file is no folder"
    store.publish_bytes("a/two", bytes(5))
    assert store.sizes("a")["two"] == 5


def test_what_is_fetched_is_compared_with_what_was_recorded(store: Store) -> None:
    (entry,) = published(store, "unit", {"data": b"ten bytes."})
    for _ in range(2):
        assert store.fetch("unit/data", 10, entry.sha256).read_bytes() == b"ten bytes."
    store.publish_bytes("unit/data", b"nine byte")
    with pytest.raises(FileDamaged, match=r"unit/data has 9 bytes, but was published with 11 bytes"):
        store.fetch("unit/data", 11)
    assert store.fetch("unit/data", 9).read_bytes() == b"nine byte", "a copy of another size is fetched anew"


def test_a_flipped_bit_is_noticed_when_a_file_is_copied_here(s3_url: str) -> None:
    store = Store(s3_url)
    (entry,) = published(store, "unit", {"data": b"ten bytes."})
    store.publish_bytes("unit/data", b"ten bytes!")
    with pytest.raises(FileDamaged, match=f"has sha256 [0-9a-f]{{64}}, but was published with sha256 {entry.sha256}"):
        store.fetch("unit/data", 10, entry.sha256)
    store.publish_bytes("unit/data", b"ten bytes.")
    assert store.fetch("unit/data", 10, entry.sha256).read_bytes() == b"ten bytes."


def test_a_folder_is_fetched_whole(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where each file is more than the cache is to hold."""
    monkeypatch.setenv("LATENTWORKS_CACHE_GB", "0")
    contents = {"config.json": b"{}", "unet/weights": b"w" * 1000, "unet/config.json": b"[]"}
    files = published(store, "model", contents)
    folder = store.fetch_folder("model", files)
    assert {file.name: (folder / file.name).read_bytes() for file in files} == contents
    with pytest.raises(FileNotFoundError):
        store.fetch_folder("model", [*files, Entry("absent", 1, "")])
    store.publish_bytes("model/unet/weights", b"w" * 999)
    (folder / "unet/weights").write_bytes(b"w" * 999)
    with pytest.raises(FileDamaged, match="unet/weights has 999 bytes"):
        store.fetch_folder("model", files)


def test_two_addresses_with_buckets_of_one_name_have_their_own_copies(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(s3_url)
    store.publish_bytes("x", b"here")
    here = store.fetch("x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert not here.samefile(store.fetch("x"))


def test_a_store_travels_between_processes(store: Store) -> None:
    store.publish_bytes("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read_bytes("x") == b"1"


def test_an_unwritable_store_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "store")
    with pytest.raises(StorageError, match=r"can't write .*recipe key `store`"):
        store.check_writable()


@pytest.fixture
def without_credentials(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3_url
    s3fs.S3FileSystem.clear_instance_cache()


def test_without_credentials_all_that_is_tried_says_so(without_credentials: str) -> None:
    store = Store(without_credentials)
    for read in (store.exists, store.listdir, store.sizes, store.read_bytes, store.read_json, store.open, store.fetch):
        with pytest.raises(StorageError, match=rf"can't read {store.url}/a: .*AWS_ACCESS_KEY_ID"):
            read("a")
    with pytest.raises(StoreUnwritable, match=rf"can't write {store.url}/a: .*AWS_ACCESS_KEY_ID"):
        store.publish_bytes("a", b"")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3x://bucket/store", r"'s3x://bucket/store' can't be used: .*known.*recipe key `store`"),
        (
            "packaged://bucket",
            r"no driver for store 'packaged://bucket' is installed \(Please install absent\): install",
        ),
    ],
)
def test_a_url_without_a_driver_is_one_clear_error(url: str, message: str) -> None:
    fsspec.register_implementation("packaged", "absent.Driver", clobber=True, errtxt="Please install absent")
    with pytest.raises(StorageError, match=message):
        Store(url)


def test_a_bucket_that_refuses_is_one_clear_error(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(s3_url)

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError("Access Denied.")

    monkeypatch.setattr(store._fs, "cat_file", refuse)
    monkeypatch.setattr(store._fs, "pipe_file", refuse)
    with pytest.raises(StorageError, match=r"can't read .*/a: Access Denied; ask for access"):
        store.read_bytes("a")
    with pytest.raises(StoreUnwritable, match=r"can't write .*/a: Access Denied; ask for access"):
        store.publish_bytes("a", b"")


def test_a_mistake_of_ours_is_not_the_stores(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(TypeError):
        store.publish_bytes("a", "text")  # type: ignore[arg-type]


def test_damaged_json_names_the_file(store: Store) -> None:
    store.publish_bytes("bad.json", b"{")
    with pytest.raises(StorageError, match=r"bad\.json is not valid JSON"):
        store.read_json("bad.json")


def test_no_scratch_is_left_after_a_failed_write(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StorageError):
        store.publish_file("x", tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []
