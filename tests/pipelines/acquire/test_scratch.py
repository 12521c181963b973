from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from pipelines.acquire.scratch import scratch_folder

HOLD = """
import sys, time, tempfile
tempfile.tempdir = sys.argv[1]
from pipelines.acquire.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "big").write_text("x")
    print(folder, flush=True)
    time.sleep(60)
"""


def age(folder: Path) -> None:
    os.utime(folder / "lock", (0, time.time() - 3600))


def test_folders_of_the_killed_are_removed_and_those_of_the_living_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        age(left)
        with scratch_folder() as mine:
            age(mine)
            with scratch_folder() as other:
                assert mine.is_dir()
                assert left.is_dir()
            assert not other.exists()
        process.send_signal(signal.SIGKILL)
    with scratch_folder():
        assert not left.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_just_being_made_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    young = tmp_path / "latentworks-acquire-young"
    young.mkdir()
    (young / "lock").touch()
    with scratch_folder():
        assert young.is_dir()
