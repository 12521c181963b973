from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldm.diffusion import Diffusion, DiffusionConfig, Prediction, denoised
from ldm.errors import ConfigError
from ldm.samplers import SAMPLERS, Level, Levels, get_sampler

# diffusers hands tensors to np.array: NumPy 2 would like torch to take its `copy` keyword.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

TYPES: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
SCALED_LINEAR = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def network(x: Tensor, time: float) -> Tensor:
    """A smooth function of input and time, in the place of the U-Net."""
    return torch.tanh(0.7 * x + time / 1000) + 0.3 * x.roll(1, -1)


def scheduler(sampler: str, prediction: Prediction) -> Any:
    """diffusers' scheduler of the same solver, set as Stable Diffusion sets it."""
    flow = prediction == "flow"
    kind = TYPES[prediction]
    if sampler == "dpmpp_2m":
        settings = {"use_flow_sigmas": True} if flow else SCALED_LINEAR
        return diffusers.DPMSolverMultistepScheduler(prediction_type=kind, **settings)
    if flow:
        return diffusers.FlowMatchEulerDiscreteScheduler()
    if sampler == "euler":
        return diffusers.EulerDiscreteScheduler(prediction_type=kind, **SCALED_LINEAR)
    return diffusers.DDIMScheduler(
        prediction_type=kind, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **SCALED_LINEAR
    )


def their_trajectory(
    sampler: str, prediction: Prediction, noise: Tensor, steps: int
) -> tuple[list[Tensor], list[float]]:
    """What the network sees at each step, then the result; and the times that it is given."""
    theirs = scheduler(sampler, prediction)
    theirs.set_timesteps(steps)
    x = noise * getattr(theirs, "init_noise_sigma", 1.0)
    seen, times = [], []
    for time in theirs.timesteps:
        scaled = theirs.scale_model_input(x, time) if hasattr(theirs, "scale_model_input") else x
        seen.append(scaled)
        times.append(float(time))
        x = theirs.step(network(scaled, float(time)), time, x, return_dict=False)[0]
    return [*seen, x], times


# One evenly spaced step of diffusers' discrete Euler starts at time 0, where there is no noise to remove.
CASES = [
    (sampler, prediction, steps)
    for sampler in SAMPLERS
    for prediction in TYPES
    for steps in (1, 2, 7, 20)
    if steps > 1 or sampler != "euler" or prediction == "flow"
]


@pytest.mark.parametrize(("sampler", "prediction", "steps"), CASES)
def test_trajectories_are_those_of_diffusers(sampler: str, prediction: Prediction, steps: int) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, times = their_trajectory(sampler, prediction, noise, steps)
    diffusion = Diffusion(DiffusionConfig(prediction))
    seen: list[Tensor] = []
    given: list[float] = []

    def denoise(x: Tensor, level: Level) -> Tensor:
        seen.append(x)
        given.append(level.time)
        return denoised(prediction, x, network(x, level.time), level.alpha, level.sigma)

    method = get_sampler(sampler)
    result = method.solve(denoise, noise, method.levels(diffusion, steps))
    assert given == pytest.approx(times, abs=1e-3)
    for mine, yours in zip([*seen, result], expected, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", list(TYPES))
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_perfect_network_is_followed_to_the_data(sampler: str, prediction: Prediction) -> None:
    """If all data is one point, x0 is that point whatever the noise."""
    point = torch.full((1, 4, 2, 2), 0.5)
    method = get_sampler(sampler)
    levels = method.levels(Diffusion(DiffusionConfig(prediction)), 10)
    result = method.solve(lambda x, level: point.expand_as(x), torch.randn(3, 4, 2, 2), levels)
    remaining = levels.levels[-1].sigma
    torch.testing.assert_close(
        result, levels.levels[-1].alpha * point.expand(3, -1, -1, -1), rtol=0, atol=5 * remaining + 1e-5
    )


@pytest.mark.parametrize("prediction", ["eps", "flow"])
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_noise_falls_at_every_step(sampler: str, prediction: Prediction) -> None:
    for steps in (1, 3, 12, 50, 999):
        levels = get_sampler(sampler).levels(Diffusion(DiffusionConfig(prediction)), steps)
        ratios = [level.alpha / level.sigma if level.sigma else float("inf") for level in levels.levels]
        assert levels.steps == steps
        assert all(before < after for before, after in pairwise(ratios))


def test_orders_of_convergence() -> None:
    """On a Gaussian, whose x0 is known exactly, twice the steps halve DDIM's error and quarter DPM-Solver++(2M)'s."""
    variance = 0.25
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).view(1, 1, 3, 3)

    def denoise(x: Tensor, level: Level) -> Tensor:
        return level.alpha * variance / (level.alpha**2 * variance + level.sigma**2) * x

    def error(solver: str, steps: int) -> float:
        alphas = torch.linspace(-4, 4, steps + 1, dtype=torch.float64).sigmoid().sqrt().tolist()
        levels = Levels(tuple(Level(0, alpha, (1 - alpha**2) ** 0.5) for alpha in alphas))
        # The flow of the ODE keeps quantiles: only the standard deviation changes.
        first, last = ((level.alpha**2 * variance + level.sigma**2) ** 0.5 for level in levels.levels[::steps])
        return float((SAMPLERS[solver].solve(denoise, noise, levels) - noise * last / first).abs().max())

    assert error("ddim", 80) / error("ddim", 40) == pytest.approx(1 / 2, abs=0.05)
    assert error("dpmpp_2m", 80) / error("dpmpp_2m", 40) == pytest.approx(1 / 4, abs=0.05)


def test_unknown_samplers_and_impossible_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="'plms' is unknown: choose one of ddim, euler, dpmpp_2m"):
        get_sampler("plms")
    for sampler in SAMPLERS.values():
        for steps in (0, 1000):
            with pytest.raises(ConfigError, match=f"steps = {steps}"):
                sampler.levels(Diffusion(DiffusionConfig("eps")), steps)
