"""The benchmarks run, and both sides of each come to the same result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(script: str, result: Path, *arguments: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments, "--json", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text())


@pytest.mark.slow
def test_what_is_for_a_gpu_runs_tiny_on_a_cpu(tmp_path: Path) -> None:
    report = run("gpu.py", tmp_path / "gpu.json", "--device", "cpu", "--tiny")
    figures = report["figures"]
    assert {figure["case"] for figure in figures} == {"train", "encode", "sample"}
    assert {figure["who"] for figure in figures} >= {"ldm", "diffusers eager"}
    assert all(figure["images_per_s"] > 0 and figure["tflop_per_image"] > 0 for figure in figures)
    assert report["versions"]["torch"]


@pytest.mark.slow
def test_the_library_and_its_peers_agree(tmp_path: Path) -> None:
    report = run("model.py", tmp_path / "model.json", "--quick")
    assert {result["case"] for result in report["results"]} == {"unet step", "vae encode", "sample", "frechet"}
    assert all(result["difference"] <= result["tolerance"] for result in report["results"])
