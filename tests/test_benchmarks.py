"""The benchmarks run, and say at their end, on one line, what they measured."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
QUICKLY = {"acquire.py": [], "model.py": [], "gpu.py": ["--device", "cpu", "--tiny"]}
"""Every benchmark, with what `--quick` needs beside it on a machine without a GPU."""
CASES = {
    "acquire.py": {"gallery PNG to 64 px JPEG"},
    "model.py": {"unet step", "vae encode", "sample", "frechet"},
    "gpu.py": {"encode", "train", "product", "sample"},
}


@pytest.fixture(autouse=True)
def _cases_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a script in that folder."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def test_every_benchmark_is_run_here() -> None:
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == set(QUICKLY)


def command(script: str, result: Path) -> list[str]:
    return [sys.executable, str(ROOT / "benchmarks" / script), "--quick", *QUICKLY[script], "--json", str(result)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", QUICKLY)
def test_the_last_line_is_one_json_object_with_rows(script: str, tmp_path: Path) -> None:
    """Sides that come to different results end with an error, or have no row."""
    done = subprocess.run(
        command(script, tmp_path / "result.json"), capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {"benchmark", "rows"}
    assert found["benchmark"] == script.removesuffix(".py")
    assert {row["case"].partition(":")[0].partition(",")[0] for row in found["rows"]} == CASES[script]
    for row in found["rows"]:
        assert list(row) == ["case", "unit", "ours", "peer", "ratio"]
        better = {"ms": row["peer"] / row["ours"], "images/s": row["ours"] / row["peer"]}[row["unit"]]
        assert row["ratio"] == pytest.approx(better, rel=2e-3)  # four digits are told
    assert json.loads((tmp_path / "result.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_is_cut_keeps_its_figures(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    with subprocess.Popen(command("gpu.py", result), stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGKILL)
    kept = json.loads(result.read_text())
    assert [figure["who"] for figure in kept["figures"]][:1] == ["ldm"]
    assert len(kept["figures"]) >= 1
    assert told[0].startswith("encode   ldm ")
    assert kept["versions"]["torch"] == torch.__version__


def test_ratios_are_above_1_where_ours_is_better() -> None:
    from cases.rows import Row, last_line

    rows = [Row("a", "ms", 2.0, 3.0), Row("b", "images/s", 2.0, 3.0)]
    assert [row.ratio for row in rows] == pytest.approx([1.5, 2 / 3])
    assert json.loads(last_line("model", rows))["rows"][0] == {
        "case": "a", "unit": "ms", "ours": 2.0, "peer": 3.0, "ratio": 1.5,
    }  # fmt: skip


def test_peak_rates_are_of_exactly_that_device() -> None:
    """An L40 isn't an L4, nor a card for PCIe the one on a board; what isn't known has none."""
    from cases.peaks import peak_tflops

    assert peak_tflops("NVIDIA L40") == 181.05
    assert peak_tflops("NVIDIA L4") == 121.0
    assert peak_tflops("NVIDIA H100 PCIe") < peak_tflops("NVIDIA H100 80GB HBM3")
    assert peak_tflops("NVIDIA A100-SXM4-80GB MIG 1g.10gb") is None
    assert peak_tflops("NVIDIA GeForce RTX 4090") is None


def test_operations_are_those_that_are_published() -> None:
    """0.543 and 2.413 TFLOP for a training step of Stable Diffusion 2's U-Net, by MLPerf's reference."""
    from cases.full_size import FULL, unet_tflop

    assert 3 * unet_tflop(FULL.unet, 32, FULL.context) == pytest.approx(0.543, abs=5e-4)


def side(name: str, **settings: Any) -> Any:
    from cases.compare import Side

    return Side(name, {setting.replace("_", ", "): (lambda call=call: call) for setting, call in settings.items()})


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ([1.0, 2.5], "results of float32 and the peer's float32 differ by 2.00e-01, more than 1e-04"),
        ([1.0, float("nan")], "differ by nan"),
        ([1.0, 2.0, 3.0], r"results are \(2,\) and \(3,\)"),
    ],
)
def test_results_that_differ_are_an_error(theirs: list[float], message: str) -> None:
    from cases.compare import compare

    asked: dict[str, Any] = {"device": "cpu", "rounds": 1, "aim": None}
    ours = torch.tensor([1.0, 2.0])
    found = compare("case", "", side("a", float32=lambda: ours), side("b", float32=lambda: ours + 1e-6), **asked)
    assert found.difference <= 1e-6
    with pytest.raises(AssertionError, match=message):
        compare("case", "", side("a", float32=lambda: ours), side("b", float32=lambda: torch.tensor(theirs)), **asked)
    with pytest.raises(AssertionError, match="no precision is both sides'"):
        compare("case", "", side("a", float32=lambda: ours), side("b", bfloat16=lambda: ours), **asked)


def test_each_side_has_its_fastest_setting() -> None:
    """And both are compared in every precision that both have."""
    import time

    from cases.compare import compare

    def taking(seconds: float, value: float = 1.0) -> Any:
        def call() -> torch.Tensor:
            time.sleep(seconds)
            return torch.tensor([value, 2.0])

        return call

    ours = side("a", float32=taking(0.001), bfloat16=taking(0.1, 1.05))
    theirs = side("b", float32=taking(0.2), float32_contiguous=taking(0.1), bfloat16=taking(0.001))
    found = compare("case", "", ours, theirs, device="cpu", rounds=2, aim=None)
    assert (found.ours_setting, found.peer_setting) == ("float32", "bfloat16")
    assert set(found.tried["peer"]) == {"float32", "float32, contiguous", "bfloat16"}
    assert found.difference == 0
    odd = side("b", float32=taking(0.001), float32_contiguous=taking(0.1, 1.5))
    with pytest.raises(AssertionError, match="the peer's float32, contiguous differ"):
        compare("case", "", ours, odd, device="cpu", rounds=2, aim=None)


def test_a_side_that_fails_or_differs_has_no_row_and_the_others_stay() -> None:
    from cases.measure import Meter, Place

    told: list[str] = []
    meter = Meter("cpu", 1, lambda meter, line: told.append(line))

    def place(who: str) -> Place:
        return Place("train", who, "eager", 64, 2, 0.5)

    def out_of_memory() -> Any:
        raise torch.OutOfMemoryError("out of memory")

    meter.measure(place("ldm"), lambda: lambda: torch.tensor([1.0, 2.0]))
    meter.measure(place("diffusers"), out_of_memory)
    meter.measure(place("odd"), lambda: lambda: torch.tensor([2.0, 1.0]))
    meter.measure(place("same"), lambda: lambda: torch.tensor([1.0, 2.001]))
    assert [figure.place.who for figure in meter.figures] == ["ldm", "odd", "same"]
    assert "diffusers: OutOfMemoryError: out of memory" in meter.failed[0]
    assert "the first result differs by" in meter.failed[1]
    rows = meter.rows({"ldm": "same", "same": "odd", "odd": "ldm", "diffusers": "ldm"})
    assert [row.case for row in rows] == ["train, 64 px, batch 2, eager: ldm beside same"]
    assert len(told) == 5
