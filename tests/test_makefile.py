"""`make setup`: an environment of the wrong Python is never made, and one that is there is made anew."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
# Stands for an interpreter: says its version, whether it suits, and makes an environment of itself.
case "$*" in
    --version) echo "Python {version}" ;;
    "-c "*) exit {unsuitable} ;;
    "-m venv --clear "*) rm -rf "$4" && mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
    "-m pip "*) echo "{version} $*" >> pip.log ;;
esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for version, unsuitable in (("3.12.1", 0), ("3.13.0", 1)):
        python = tmp_path / f"python{version}"
        python.write_text(PYTHON.format(version=version, unsuitable=unsuitable))
        python.chmod(0o755)
    return tmp_path


def setup(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "setup", f"PYTHON={folder / python}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_wrong_python_is_refused_before_anything_is_made(folder: Path) -> None:
    done = setup(folder, "python3.13.0")
    assert done.returncode == 2
    assert "is Python 3.13.0, and 3.11 or 3.12 is needed" in done.stdout
    assert not (folder / ".venv").exists()
    missing = setup(folder, "nothing")
    assert missing.returncode == 2
    assert "not found; install Python 3.11 or 3.12" in missing.stdout


def test_an_environment_of_another_python_is_made_anew(folder: Path) -> None:
    (folder / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(folder / "python3.13.0", folder / ".venv" / "bin" / "python")
    (folder / ".venv" / ".installed").touch()
    (folder / ".venv" / "left").touch()
    assert setup(folder, "python3.12.1").returncode == 0
    assert not (folder / ".venv" / "left").exists()
    installed = (folder / "pip.log").read_text()
    assert "3.12.1" in installed
    assert "3.13.0" not in installed


def test_a_finished_environment_is_left_alone(folder: Path) -> None:
    assert setup(folder, "python3.12.1").returncode == 0
    (folder / "pip.log").unlink()
    done = setup(folder, "python3.13.0")  # it isn't asked any more
    assert done.returncode == 0
    assert not (folder / "pip.log").exists()


def test_what_is_installed_follows_the_requirements(folder: Path) -> None:
    assert setup(folder, "python3.12.1").returncode == 0
    (folder / "pip.log").unlink()
    stamp = folder / ".venv" / ".installed"
    newer_s = stamp.stat().st_mtime + 10
    os.utime(folder / "constraints.txt", (newer_s, newer_s))
    assert setup(folder, "python3.12.1").returncode == 0
    assert "--constraint constraints.txt" in (folder / "pip.log").read_text()
