"""The benchmarks run, and one whose sides come to different results ends with an error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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
    assert all(figure["tflop_per_image"] > 0 for figure in figures)
    assert report["versions"]["torch"]


@pytest.mark.slow
def test_the_library_and_its_peers_agree(tmp_path: Path) -> None:
    """The script ends with an error where they don't."""
    report = run("model.py", tmp_path / "model.json", "--quick")
    assert {result["case"] for result in report["results"]} == {"unet step", "vae encode", "sample", "frechet"}


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ([1.0, 2.5], "results differ by 2.00e-01, more than 1e-04"),
        ([1.0, float("nan")], "results differ by nan"),
        ([1.0, 2.0, 3.0], r"results are \(2,\) and \(3,\)"),
    ],
)
def test_results_that_differ_are_an_error(theirs: list[float], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from cases.compare import compare

    setting: dict[str, Any] = {"device": "cpu", "peer": "p", "rounds": 1, "tolerance": 1e-4, "aim": None}
    ours = torch.tensor([1.0, 2.0])
    assert compare("case", "", ours=lambda: ours, theirs=lambda: ours + 1e-6, **setting).difference <= 1e-6
    with pytest.raises(AssertionError, match=message):
        compare("case", "", ours=lambda: ours, theirs=lambda: torch.tensor(theirs), **setting)
