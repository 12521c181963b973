"""Training on one device: against plain torch, against the CPU, and against itself after a resume."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

WORKER = Path(__file__).with_name("engine_worker.py")
RUNS = [f"stage {stage}, {precision}" for stage in (1, 2, 3) for precision in ("fp32", "bf16")]

Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(device: str, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder = tmp_path_factory.mktemp(device)
    # The workspace is what makes cuBLAS sum in one order.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, str(WORKER), device, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: Outcomes = torch.load(folder / "outcomes.pt", weights_only=True)
    assert found[RUNS[0]]["device"] == device
    return found


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_updates_are_those_of_plain_torch(outcomes: Outcomes, stage: int) -> None:
    """And the average is that of `ldm.ema`."""
    found, plain = outcomes[f"stage {stage}, fp32"], outcomes["plain"]
    np.testing.assert_allclose(found["losses"], plain["losses"], rtol=1e-5)
    np.testing.assert_allclose(found["grad_norms"], plain["grad_norms"], rtol=1e-4)
    assert max(plain["grad_norms"]) > 0.5, "want steps with clipping"
    assert_close(found["weights"][-1], plain["weights"][-1], 2e-5)
    assert_close(found["ema"][-1], plain["ema"][-1], 2e-5)


def test_the_course_of_training_is_the_cpus(outcomes: Outcomes) -> None:
    found, expected = outcomes["stage 1, fp32"], outcomes["plain on the CPU"]
    # The first step differs by rounding alone; later ones also by what optimizer steps make of it.
    assert found["losses"][0] == pytest.approx(expected["losses"][0], rel=1e-5)
    assert found["grad_norms"][0] == pytest.approx(expected["grad_norms"][0], rel=1e-4)
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-3)


@pytest.mark.parametrize("run", RUNS)
def test_the_average_is_of_the_fp32_weights(outcomes: Outcomes, run: str) -> None:
    found = outcomes[run]
    average = found["ema"][0]
    for weights, decay in zip(found["weights"][1:], found["decays"][1:], strict=True):
        assert all(value.dtype == torch.float32 for value in weights.values())
        average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
    assert_close(found["ema"][-1], average, 1e-6)
    assert any(not torch.equal(average[name], value) for name, value in found["weights"][-1].items())


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_run_ends_in_the_same_weights_bit_for_bit(outcomes: Outcomes, run: str) -> None:
    undisturbed, resumed = outcomes[run], outcomes[f"{run}, resumed"]
    left = len(resumed["losses"])
    assert 0 < left < len(undisturbed["losses"])
    assert resumed["losses"] == undisturbed["losses"][-left:]
    assert resumed["grad_norms"] == undisturbed["grad_norms"][-left:]
    for kind in ("weights", "ema"):
        for name, value in undisturbed[kind][-1].items():
            assert torch.equal(resumed[kind][-1][name], value), (kind, name)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_what_the_network_computes_in_and_the_loss_is_near(outcomes: Outcomes, stage: int) -> None:
    half, whole = outcomes[f"stage {stage}, bf16"], outcomes[f"stage {stage}, fp32"]
    assert half["hidden"] == "torch.bfloat16"
    assert whole["hidden"] == "torch.float32"
    np.testing.assert_allclose(half["losses"], whole["losses"], rtol=0.02)
    assert half["losses"] != whole["losses"]
