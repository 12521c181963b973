"""Disks that are full, read-only or not there: one message that names the place, and the same command goes on after."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import TinyRecipe, free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small disk, which takes root"),
]


class Disk:
    """A disk in memory, whose size and mode can be changed while it is in use."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.path)], check=True)

    def change(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True)

    def used_kib(self) -> int:
        status = os.statvfs(self.path)
        return (status.f_blocks - status.f_bfree) * status.f_frsize // 1024


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.mkdir()
    found = Disk(path)
    try:
        found.mount("size=64m")
    except subprocess.CalledProcessError:
        pytest.skip("no mounts in this container")
    yield found
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture
def recipe(tmp_path: Path, disk: Disk) -> TinyRecipe:
    """Its store is on the disk."""
    (tmp_path / "work").mkdir()
    return TinyRecipe(tmp_path / "work", free_port(), store=str(disk.path / "store"))


def expect_refusal(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stdout
    (message,) = (line for line in done.stdout.splitlines() if line.startswith("error: "))
    for word in (*words, "run the same command again"):
        assert word in message


def test_acquire_fills_the_disk_and_goes_on_when_there_is_room(recipe: TinyRecipe, disk: Disk) -> None:
    disk.change("size=256k")
    expect_refusal(recipe.ldm("--until", "acquire"), str(disk.path), "No space left on device", "recipe key `store`")
    store = Path(recipe.store)
    assert not any(store.glob("acquire/keys/*.json"))
    assert not any(store.glob("**/*.part"))
    finished = {path: path.stat().st_mtime_ns for path in store.glob("acquire/units/*/record.json")}
    disk.change("size=64m")
    done = recipe.ldm("--until", "acquire")
    assert done.returncode == 0, done.stdout
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # not made again


def test_checkpoints_fill_the_disk_and_training_goes_on_when_there_is_room(recipe: TinyRecipe, disk: Disk) -> None:
    assert recipe.ldm("--until", "select").returncode == 0
    disk.change(f"size={disk.used_kib() + 64}k")
    done = recipe.ldm("--until", "train.autoencoder")
    expect_refusal(done, str(disk.path), "No space left on device")
    assert not any(Path(recipe.store).glob("train.autoencoder/keys/*.json"))
    disk.change("size=64m")
    done = recipe.ldm("--until", "train.autoencoder")
    assert done.returncode == 0, done.stdout


def test_a_read_only_store_is_refused_before_anything_starts(recipe: TinyRecipe, disk: Disk) -> None:
    disk.change("ro")
    done = recipe.ldm("--until", "acquire")
    expect_refusal(done, str(disk.path), "Read-only file system")
    assert "starting Ray" not in done.stdout
    disk.change("rw")


def test_a_full_state_folder_is_named_and_its_databases_are_made_later(recipe: TinyRecipe, disk: Disk) -> None:
    recipe.settings |= {"store": str(recipe.folder / "store"), "state_dir": str(disk.path / "state")}
    disk.change("size=256k")
    expect_refusal(recipe.ldm("--until", "acquire"), str(disk.path / "state"), "recipe key `state_dir`")
    disk.change("size=64m")
    done = recipe.ldm("--until", "acquire")
    assert done.returncode == 0, done.stdout
    assert not any((disk.path / "state" / "spool").iterdir()), done.stdout  # MLflow has it all


@pytest.mark.parametrize("key", ["store", "state_dir"])
def test_a_file_where_a_folder_should_be(recipe: TinyRecipe, key: str) -> None:
    file = recipe.folder / "file"
    file.write_text("")
    recipe.settings[key] = str(file)
    expect_refusal(recipe.ldm("--until", "acquire"), str(file), "Not a directory", f"{key}: ")
