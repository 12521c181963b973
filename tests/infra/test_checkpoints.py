"""Checkpoints on the local disk and in S3: only whole ones count, and only sound ones are used."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from infra.checkpoints import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointRef,
    FileDigest,
    complete_checkpoints,
    fetch_checkpoint,
    newest_sound_checkpoint,
    prune_checkpoints,
    publish_checkpoint,
    publish_manifest,
    upload_files,
)
from infra.storage import StorageError, Store

PREFIX = "train/units/abc/checkpoints"
SHA256_OF_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def saved(folder: Path, content: str) -> Path:
    """A folder as an engine leaves it."""
    folder.mkdir(exist_ok=True)
    (folder / "rank_00000.safetensors").write_text(content * 100)
    (folder / "rank_00001.safetensors").write_bytes(b"")
    (folder / "state.json").write_text('{"format": 1}')
    return folder


def newest(store: Store) -> CheckpointRef | None:
    return next(iter(complete_checkpoints(store, PREFIX)), None)


def do_damage(store: Store, ref: CheckpointRef, damage: str) -> None:
    path = f"{ref.path}/rank_00000.safetensors"
    data = bytearray(store.read_bytes(path))
    if damage == "flipped":
        data[500] ^= 1
        store.publish_bytes(path, bytes(data))
    elif damage == "cut":
        store.publish_bytes(path, bytes(data[:-1]))
    else:
        store.delete(path)


def test_publishes_and_fetches(store: Store, tmp_path: Path) -> None:
    assert newest(store) is None
    for step in (5, 1000, 20):
        publish_checkpoint(store, PREFIX, saved(tmp_path / "saved", str(step)), step, {"loss": step / 10})
    ref = newest(store)
    assert ref is not None
    assert (ref.step, ref.info) == (1000, {"loss": 100.0})
    assert FileDigest("rank_00001.safetensors", 0, SHA256_OF_NOTHING) in ref.files
    assert [ref.step for ref in complete_checkpoints(store, PREFIX)] == [1000, 20, 5]
    local = fetch_checkpoint(store, ref)
    assert (local / "rank_00000.safetensors").read_text() == "1000" * 100
    assert (local / "state.json").read_text() == '{"format": 1}'


def test_a_checkpoint_without_manifest_is_ignored(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(tmp_path / "saved", "x")
    publish_checkpoint(store, PREFIX, folder, 1, {})
    upload_files(store, PREFIX, folder, 2, ["rank_00000.safetensors", "state.json"])
    with caplog.at_level(logging.WARNING):
        ref = newest(store)
    assert ref is not None
    assert ref.step == 1
    assert "000000002 is incomplete" in caplog.text


@pytest.mark.parametrize(
    "content",
    [b'{"format": 1, "files"', b"[]", b'{"format": 1}', b'{"format": 99, "files": [], "step": 2, "info": {}}'],
)
def test_a_damaged_manifest_is_ignored(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    publish_checkpoint(store, PREFIX, saved(tmp_path / "saved", "x"), 1, {})
    store.publish_bytes(f"{PREFIX}/000000002/manifest.json", content)
    ref = newest(store)
    assert ref is not None
    assert ref.step == 1
    assert "000000002" in caplog.text


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_file_is_refused_by_name(store: Store, tmp_path: Path, damage: str) -> None:
    folder = saved(tmp_path / "saved", "ten bytes.")
    publish_checkpoint(store, PREFIX, folder, 1, {})
    ref = publish_checkpoint(store, PREFIX, folder, 2, {})
    do_damage(store, ref, damage)
    with pytest.raises(CheckpointCorrupt, match=r"000000002/rank_00000\.safetensors"):
        fetch_checkpoint(store, ref)
    assert fetch_checkpoint(store, complete_checkpoints(store, PREFIX)[1]).name == "000000001"


def test_publishing_a_step_again_replaces_it(store: Store, tmp_path: Path) -> None:
    """Also where a node has fetched, and so cached, what was there before."""
    fetch_checkpoint(store, publish_checkpoint(store, PREFIX, saved(tmp_path / "saved", "old"), 1, {}))
    files = upload_files(store, PREFIX, saved(tmp_path / "saved", "new"), 1, ["rank_00000.safetensors", "state.json"])
    assert newest(store) is None, "half replaced, it must not count"
    publish_manifest(store, PREFIX, 1, files, {})
    ref = newest(store)
    assert ref is not None
    assert (fetch_checkpoint(store, ref) / "rank_00000.safetensors").read_text() == "new" * 100


def test_ranks_upload_their_own_files(store: Store, tmp_path: Path) -> None:
    nodes = [saved(tmp_path / node, node) for node in ("a", "b")]
    files = upload_files(store, PREFIX, nodes[1], 7, ["rank_00001.safetensors"])
    files += upload_files(store, PREFIX, nodes[0], 7, ["rank_00000.safetensors", "state.json"])
    assert newest(store) is None
    ref = publish_manifest(store, PREFIX, 7, files, {"world_size": 2})
    assert newest(store) == ref
    assert (fetch_checkpoint(store, ref) / "rank_00000.safetensors").read_text() == "a" * 100


def test_a_manifest_names_each_file_once(store: Store) -> None:
    file = FileDigest("rank_00000.safetensors", 0, SHA256_OF_NOTHING)
    with pytest.raises(CheckpointError, match="each name once"):
        publish_manifest(store, PREFIX, 1, [file, file], {})
    with pytest.raises(CheckpointError, match="at least one file"):
        publish_manifest(store, PREFIX, 1, [], {})
    assert newest(store) is None


def test_prunes_old_and_torn_ones(store: Store, tmp_path: Path) -> None:
    folder = saved(tmp_path / "saved", "x")
    assert prune_checkpoints(store, PREFIX) == []
    for step in (1, 2, 4, 5):
        publish_checkpoint(store, PREFIX, folder, step, {})
    for torn in (3, 6):
        upload_files(store, PREFIX, folder, torn, ["state.json"])
    store.publish_bytes(f"{PREFIX}/notes.txt", b"not a checkpoint")
    deleted = prune_checkpoints(store, PREFIX, keep=2)
    assert [path.rsplit("/", 1)[1] for path in deleted] == ["000000001", "000000002", "000000003"]
    assert store.listdir(PREFIX) == ["000000004", "000000005", "000000006", "notes.txt"]
    assert store.listdir(f"{PREFIX}/000000001") == []
    with pytest.raises(ValueError, match="keep must be at least 1"):
        prune_checkpoints(store, PREFIX, keep=0)


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_not_kept_in_a_sound_ones_stead(store: Store, tmp_path: Path, damage: str) -> None:
    folder = saved(tmp_path / "saved", "ten bytes.")
    refs = [publish_checkpoint(store, PREFIX, folder, step, {}) for step in (1, 2, 3, 4)]
    for ref in refs[2:]:
        do_damage(store, ref, damage)
    assert prune_checkpoints(store, PREFIX, keep=1) == [refs[0].path]
    assert [ref.step for ref in complete_checkpoints(store, PREFIX)] == [4, 3, 2]
    assert newest_sound_checkpoint(store, PREFIX) == refs[1]
    publish_checkpoint(store, PREFIX, folder, 5, {})
    assert prune_checkpoints(store, PREFIX, keep=1) == [ref.path for ref in refs[1:]]


def test_where_no_checkpoint_is_sound_nothing_is_deleted(store: Store, tmp_path: Path) -> None:
    for step in (1, 2):
        do_damage(store, publish_checkpoint(store, PREFIX, saved(tmp_path / "saved", "ten bytes."), step, {}), "cut")
    assert prune_checkpoints(store, PREFIX, keep=1) == []
    assert newest_sound_checkpoint(store, PREFIX) is None


def test_what_resuming_found_damaged_counts_no_longer(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sizes are right, so that pruning alone would take it for sound."""
    folder = saved(tmp_path / "saved", "ten bytes.")
    refs = [publish_checkpoint(store, PREFIX, folder, step, {}) for step in (100, 200, 300)]
    for ref in refs[1:]:
        do_damage(store, ref, "flipped")
    assert newest_sound_checkpoint(store, PREFIX) == refs[0]
    assert "000000300 is set aside" in caplog.text
    assert "damaged.json" in store.listdir(refs[2].path), "a person can look at it"
    publish_checkpoint(store, PREFIX, folder, 250, {})
    prune_checkpoints(store, PREFIX, keep=2)
    assert [ref.step for ref in complete_checkpoints(store, PREFIX)] == [250, 100]
    publish_checkpoint(store, PREFIX, folder, 300, {})
    prune_checkpoints(store, PREFIX, keep=2)
    assert newest_sound_checkpoint(store, PREFIX) == newest(store)
    assert "damaged.json" not in store.listdir(refs[2].path)
    assert store.listdir(PREFIX) == ["000000250", "000000300"]


def test_a_sound_checkpoint_of_which_a_node_has_another_copy_is_fetched_anew(s3_url: str, tmp_path: Path) -> None:
    store = Store(s3_url)
    ref = publish_checkpoint(store, PREFIX, saved(tmp_path / "saved", "ten bytes."), 1, {})
    copy = fetch_checkpoint(store, ref) / "rank_00000.safetensors"
    copy.write_bytes(bytes(1000))
    assert newest_sound_checkpoint(store, PREFIX) == ref
    assert copy.read_text() == "ten bytes." * 100


def test_a_store_that_fails_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    folder = saved(tmp_path / "saved", "x")
    publish_checkpoint(store, PREFIX, folder, 1, {})
    (tmp_path / "store" / PREFIX / "000000002").write_text("a file where a folder must be")
    with pytest.raises(StorageError, match="000000002"):
        publish_checkpoint(store, PREFIX, folder, 2, {})
    ref = newest(store)
    assert ref is not None
    assert ref.step == 1
