from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm.diffusion import Diffusion, DiffusionConfig, Prediction, Schedule, denoised
from ldm.errors import ConfigError, InputError

DISCRETE: list[Prediction] = ["eps", "v", "x0"]
ALL: list[Prediction] = [*DISCRETE, "flow"]
SCHEDULES: list[Schedule] = ["linear", "scaled_linear"]
EVERY_STEP = torch.arange(1000)


def draws(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, 4, 4, generator=generator), torch.randn(count, 4, 4, 4, generator=generator)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_discrete_process_is_that_of_diffusers(schedule: Schedule) -> None:
    diffusion = Diffusion(DiffusionConfig("v", schedule=schedule))
    start, end = diffusion.config.betas
    theirs = diffusers.DDPMScheduler(beta_schedule=schedule, beta_start=start, beta_end=end)
    torch.testing.assert_close(diffusion.alphas_cumprod, theirs.alphas_cumprod)
    x0, noise = draws()
    t = torch.tensor([0, 1, 10, 250, 500, 750, 998, 999])
    torch.testing.assert_close(diffusion.noised(x0, noise, t), theirs.add_noise(x0, noise, t))
    torch.testing.assert_close(diffusion.target(x0, noise, t), theirs.get_velocity(x0, noise, t))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_discrete_snr_falls_and_variance_is_preserved(schedule: Schedule) -> None:
    diffusion = Diffusion(DiffusionConfig("eps", schedule=schedule))
    snr = diffusion.snr(EVERY_STEP)
    assert bool((snr.diff() < 0).all())
    alpha, sigma = diffusion.alpha_sigma(EVERY_STEP)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(1000))


@pytest.mark.parametrize("prediction", ALL)
@given(u=st.floats(0, 1, exclude_max=True, width=32))
def test_target_gives_x0_back(prediction: Prediction, u: float) -> None:
    diffusion = Diffusion(DiffusionConfig(prediction))
    t = diffusion.timesteps_from_uniform(torch.tensor([u]))
    alpha, sigma = (float(value) for value in diffusion.alpha_sigma(t))
    x0, noise = draws(1)
    found = denoised(prediction, diffusion.noised(x0, noise, t), diffusion.target(x0, noise, t), alpha, sigma)
    torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-4)


def test_flow_is_a_straight_path() -> None:
    diffusion = Diffusion(DiffusionConfig("flow"))
    x0, noise = draws(3)
    t = torch.tensor([0.0, 0.25, 1.0])
    noised = diffusion.noised(x0, noise, t)
    torch.testing.assert_close(noised[0], x0[0])
    torch.testing.assert_close(noised[1], 0.75 * x0[1] + 0.25 * noise[1])
    torch.testing.assert_close(noised[2], noise[2])
    torch.testing.assert_close(diffusion.target(x0, noise, t), noise - x0)
    torch.testing.assert_close(diffusion.model_time(t), torch.tensor([0.0, 250.0, 1000.0]))


@pytest.mark.parametrize("prediction", DISCRETE)
def test_min_snr_weighs_the_error_of_x0_alike_for_all_predictions(prediction: Prediction) -> None:
    """The weighted squared error of a prediction is min(SNR, gamma) times that of the x0 it stands for."""
    gamma = 5.0
    diffusion = Diffusion(DiffusionConfig(prediction, loss_weight="min_snr", min_snr_gamma=gamma))
    t = torch.tensor([20, 200, 400, 800])
    x0, noise = draws(4)
    x = diffusion.noised(x0, noise, t)
    output = diffusion.target(x0, noise, t) + 0.1
    error = (output - diffusion.target(x0, noise, t)).square().flatten(1).mean(dim=1)
    alphas, sigmas = diffusion.alpha_sigma(t)
    for index in range(4):
        found = denoised(prediction, x[index], output[index], float(alphas[index]), float(sigmas[index]))
        expected = min(float(diffusion.snr(t)[index]), gamma) * (found - x0[index]).square().mean()
        torch.testing.assert_close(diffusion.loss_weight(t)[index] * error[index], expected, rtol=1e-3, atol=1e-6)


def test_weights_are_one_without_a_weighting() -> None:
    assert Diffusion(DiffusionConfig("eps")).loss_weight(EVERY_STEP).eq(1).all()


@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_uniform_times_are_uniform(prediction: Prediction) -> None:
    diffusion = Diffusion(DiffusionConfig(prediction))
    u = (torch.arange(4000) + 0.5) / 4000
    t = diffusion.timesteps_from_uniform(u)
    if prediction == "eps":
        assert t.dtype == torch.int64
        assert t.bincount(minlength=1000).tolist() == [4] * 1000
    else:
        torch.testing.assert_close(t, u)


def test_logit_normal_times_have_normal_logits() -> None:
    diffusion = Diffusion(DiffusionConfig("flow", timestep_sampling="logit_normal"))
    logits = diffusion.timesteps_from_uniform((torch.arange(10_000) + 0.5) / 10_000).logit()
    assert float(logits.mean()) == pytest.approx(0, abs=1e-3)
    assert float(logits.std()) == pytest.approx(1, abs=1e-2)
    assert float((logits < 1).float().mean()) == pytest.approx(0.5 * (1 + math.erf(0.5**0.5)), abs=1e-3)


@given(u=st.lists(st.floats(0, 1, exclude_max=True, width=32), min_size=1, max_size=20), flow=st.booleans())
@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_times_are_in_range_and_in_order(sampling: Any, u: list[float], flow: bool) -> None:
    diffusion = Diffusion(DiffusionConfig("flow" if flow else "v", timestep_sampling=sampling))
    t = diffusion.timesteps_from_uniform(torch.tensor(u).sort().values)
    assert bool((t.diff() >= 0).all())
    assert float(t.min()) >= 0
    assert float(t.max()) <= (1 if flow else 999)


@pytest.mark.parametrize("u", [[-0.1], [1.0], [math.nan]])
def test_numbers_outside_the_unit_interval_are_refused(u: list[float]) -> None:
    with pytest.raises(InputError, match=r"must be in \[0, 1\)"):
        Diffusion(DiffusionConfig("flow")).timesteps_from_uniform(torch.tensor(u))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prediction": "score"}, "prediction = 'score': must be one of eps, v, x0, flow"),
        ({"prediction": "eps", "schedule": "cosin"}, "schedule = 'cosin'"),
        ({"timestep_sampling": "beta"}, "timestep_sampling = 'beta'"),
        ({"loss_weight": "min_snr", "prediction": "flow"}, "min-SNR weights are for eps, v and x0"),
        ({"loss_weight": "min_snr", "prediction": "v", "min_snr_gamma": 0}, "above 0"),
        ({"prediction": "v", "beta_start": 0.5, "beta_end": 0.1}, "beta_start <= beta_end"),
    ],
)
def test_wrong_combinations_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiffusionConfig(**values)
