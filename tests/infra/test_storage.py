from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infra.storage import StorageError, Store


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


def test_a_store_travels_between_processes(store: Store) -> None:
    store.publish_bytes("x", b"1")
    assert pickle.loads(pickle.dumps(store)).read_bytes("x") == b"1"


def test_an_unwritable_store_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "store")
    with pytest.raises(StorageError, match=r"can't write .*recipe key `store`"):
        store.check_writable()


def test_damaged_json_names_the_file(store: Store) -> None:
    store.publish_bytes("bad.json", b"{")
    with pytest.raises(StorageError, match=r"bad\.json is not valid JSON"):
        store.read_json("bad.json")


def test_no_scratch_is_left_after_a_failed_write(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StorageError):
        store.publish_file("x", tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []
