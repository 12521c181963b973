from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.diffusion import MIN_WEIGHT, Diffusion, DiffusionConfig, Loss, LossWeight, Prediction, Schedule
from ldm.errors import ConfigError, InputError
from ldm.schedules import stratified

DISCRETE: list[Prediction] = ["eps", "v", "x0"]
ALL: list[Prediction] = [*DISCRETE, "flow", "edm"]
SCHEDULES: list[Schedule] = ["linear", "scaled_linear", "cosine"]
THEIRS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
EVERY_STEP = torch.arange(1000)


def draws(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, 4, 4, generator=generator), torch.randn(count, 4, 4, 4, generator=generator)


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_discrete_process_is_that_of_diffusers(schedule: Schedule, zero_terminal: bool) -> None:
    diffusion = Diffusion(DiffusionConfig("v", schedule=schedule, zero_terminal_snr=zero_terminal))
    start, end = diffusion.config.betas or (1e-4, 0.02)
    theirs = diffusers.DDPMScheduler(
        beta_schedule=THEIRS[schedule], beta_start=start, beta_end=end, rescale_betas_zero_snr=zero_terminal
    )
    torch.testing.assert_close(diffusion.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-5, atol=1e-9)
    x0, noise = draws()
    t = torch.tensor([0, 1, 10, 250, 500, 750, 998, 999])
    torch.testing.assert_close(diffusion.noised(x0, noise, t), theirs.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(diffusion.target(x0, noise, t), theirs.get_velocity(x0, noise, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_discrete_snr_falls_and_variance_is_preserved(schedule: Schedule, zero_terminal: bool) -> None:
    diffusion = Diffusion(DiffusionConfig("v", schedule=schedule, zero_terminal_snr=zero_terminal))
    snr = diffusion.snr(EVERY_STEP)
    assert bool((snr.diff() < 0).all())
    assert (float(snr[-1]) == 0) == zero_terminal
    alpha, sigma = diffusion.alpha_sigma(EVERY_STEP)
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(1000))


@given(start=st.floats(1e-5, 0.01), factor=st.floats(1, 50))
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_snr_falls_for_any_betas(schedule: Schedule, start: float, factor: float) -> None:
    config = DiffusionConfig("v", schedule=schedule, beta_start=start, beta_end=min(start * factor, 0.05))
    assert bool((Diffusion(config).snr(EVERY_STEP).diff() < 0).all())


@pytest.mark.parametrize("prediction", ALL)
@given(u=st.floats(0, 1, exclude_max=True, width=32))
def test_target_gives_x0_back(prediction: Prediction, u: float) -> None:
    diffusion = Diffusion(DiffusionConfig(prediction))
    t = diffusion.timesteps_from_uniform(torch.tensor([u]))
    x0, noise = draws(1)
    noised, target = diffusion.noised(x0, noise, t), diffusion.target(x0, noise, t)
    found = diffusion.denoised(noised, target, *diffusion.alpha_sigma(t))
    torch.testing.assert_close(found, x0, rtol=1e-3, atol=1e-3)
    alpha, sigma = (float(value) for value in diffusion.alpha_sigma(t))
    torch.testing.assert_close(diffusion.denoised(noised, target, alpha, sigma), found)


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_noise_alone_is_denoised_too(prediction: Prediction) -> None:
    diffusion = Diffusion(DiffusionConfig(prediction, zero_terminal_snr=True))
    x0, noise = draws(2)
    t = torch.tensor([999, 999])
    assert torch.equal(diffusion.noised(x0, noise, t), noise)
    found = diffusion.denoised(noise, diffusion.target(x0, noise, t), *diffusion.alpha_sigma(t))
    torch.testing.assert_close(found, x0)


def test_edm_is_that_of_diffusers_and_of_unit_variance() -> None:
    diffusion = Diffusion(DiffusionConfig("edm", sigma_data=0.7))
    theirs = diffusers.EDMEulerScheduler(sigma_data=0.7)
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 4, 128, 128, generator=generator) for _ in range(2))
    x0 = 0.7 * x0
    sigma = torch.tensor([0.01, 0.7, 50.0])
    x = diffusion.noised(x0, noise, sigma)
    inputs, target = diffusion.scale_input(x, sigma), diffusion.target(x0, noise, sigma)
    for index in range(3):
        torch.testing.assert_close(inputs[index], theirs.precondition_inputs(x[index], sigma[index]))
        expected = theirs.precondition_outputs(x[index], noise[index], sigma[index])
        torch.testing.assert_close(diffusion.denoised(x, noise, *diffusion.alpha_sigma(sigma))[index], expected)
        # Karras et al. 2022, appendix B.6: input and target have variance 1 at all noise.
        assert float(inputs[index].std()) == pytest.approx(1, abs=0.02)
        assert float(target[index].std()) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(diffusion.model_time(sigma), theirs.precondition_noise(sigma))


def test_edm_trains_on_log_normal_noise() -> None:
    diffusion = Diffusion(DiffusionConfig("edm", p_mean=-0.5, p_std=0.9))
    log_sigma = diffusion.timesteps_from_uniform((torch.arange(10_000) + 0.5) / 10_000).log()
    assert float(log_sigma.mean()) == pytest.approx(-0.5, abs=1e-3)
    assert float(log_sigma.std()) == pytest.approx(0.9, abs=1e-2)
    assert float(diffusion.timesteps_from_uniform(torch.zeros(1))) > 0


def test_edm_loss_is_the_papers() -> None:
    """λ(σ) times x0's squared error, with λ = (σ² + σ_data²)/(σ·σ_data)² (Karras et al. 2022, table 1)."""
    diffusion = Diffusion(DiffusionConfig("edm"))
    x0, noise = draws(3)
    sigma = torch.tensor([0.05, 0.5, 20.0])
    output = diffusion.target(x0, noise, sigma) + 0.1
    found = diffusion.denoised(diffusion.noised(x0, noise, sigma), output, *diffusion.alpha_sigma(sigma))
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    expected = weight * (found - x0).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(diffusion.loss(output, x0, noise, sigma), expected, rtol=1e-3, atol=1e-5)


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


@pytest.mark.parametrize("weight", ["min_snr", "debiased"])
@pytest.mark.parametrize("prediction", DISCRETE)
def test_weights_are_the_same_for_all_predictions(prediction: Prediction, weight: LossWeight) -> None:
    """The loss of a prediction is that of the x0 it stands for, times min(SNR, gamma) (min-SNR), or that of the noise
    it stands for, times 1/sqrt(SNR) (debiased)."""
    diffusion = Diffusion(DiffusionConfig(prediction, loss_weight=weight, min_snr_gamma=5.0))
    t = torch.tensor([20, 200, 400, 800])
    x0, noise = draws(4)
    x = diffusion.noised(x0, noise, t)
    output = diffusion.target(x0, noise, t) + 0.1
    alpha, sigma = (value.view(-1, 1, 1, 1) for value in diffusion.alpha_sigma(t))
    found = diffusion.denoised(x, output, *diffusion.alpha_sigma(t))
    if weight == "min_snr":
        errors, weights = found - x0, diffusion.snr(t).clamp(max=5.0)
    else:
        errors, weights = (x - alpha * found) / sigma - noise, diffusion.snr(t).rsqrt()
    expected = weights * errors.square().flatten(1).mean(dim=1)
    torch.testing.assert_close(diffusion.loss(output, x0, noise, t), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("weight", ["min_snr", "debiased"])
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_the_step_of_noise_alone_is_trained(prediction: Prediction, weight: LossWeight) -> None:
    weights = Diffusion(DiffusionConfig(prediction, loss_weight=weight, zero_terminal_snr=True)).loss_weight(EVERY_STEP)
    assert float(weights[-1]) == pytest.approx(MIN_WEIGHT)
    plain = Diffusion(DiffusionConfig(prediction, loss_weight=weight)).loss_weight(EVERY_STEP)
    assert float(plain[-1]) != pytest.approx(MIN_WEIGHT)  # without zero-terminal SNR the paper's are left as they are


@pytest.mark.parametrize("loss", ["huber", "pseudo_huber"])
def test_huber_losses_are_squares_near_zero_and_lines_far_off(loss: Loss) -> None:
    diffusion = Diffusion(DiffusionConfig("flow", loss=loss, huber_delta=0.1))
    x0, noise = draws(1)
    t = torch.tensor([0.5])
    target = diffusion.target(x0, noise, t)
    small, large, larger = (float(diffusion.loss(target + error, x0, noise, t)) for error in (1e-3, 50.0, 51.0))
    assert small == pytest.approx(1e-6, rel=1e-2)
    assert larger - large == pytest.approx(0.2, rel=1e-3)
    if loss == "huber":
        error = torch.linspace(-1, 1, 65)[:64].view(1, 4, 4, 4)
        expected = 2 * torch.nn.functional.huber_loss(error, torch.zeros_like(error), delta=0.1)
        torch.testing.assert_close(diffusion.loss(target + error, x0, noise, t)[0], expected, rtol=1e-4, atol=1e-6)


def test_loss_is_float32_and_each_samples_own() -> None:
    diffusion = Diffusion(DiffusionConfig("flow"))
    x0, noise = draws(3)
    t = torch.tensor([0.1, 0.5, 0.9])
    output = diffusion.target(x0, noise, t) + torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(diffusion.loss(output, x0, noise, t), torch.tensor([0.0, 1.0, 4.0]))
    assert diffusion.loss(output.bfloat16(), x0, noise, t).dtype == torch.float32


def test_offset_noise_is_shared_by_a_channels_pixels() -> None:
    diffusion = Diffusion(DiffusionConfig("eps", offset_noise=0.1))
    _, noise = draws(2)
    normal = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))
    added = diffusion.offset(noise, normal) - noise
    torch.testing.assert_close(added, 0.1 * normal[:, :, None, None].expand_as(noise), rtol=1e-4, atol=1e-6)


def test_input_perturbation_leaves_the_target_alone() -> None:
    diffusion = Diffusion(DiffusionConfig("eps", input_perturbation=0.1))
    x0, noise = draws(2)
    other = torch.randn(noise.shape, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([10, 900])
    noised = diffusion.noised(x0, diffusion.perturbed(noise, other), t)
    sigma = diffusion.alpha_sigma(t)[1].view(-1, 1, 1, 1)
    torch.testing.assert_close(noised - diffusion.noised(x0, noise, t), 0.1 * sigma * other, rtol=1e-3, atol=1e-5)
    assert torch.equal(diffusion.target(x0, noise, t), noise)


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


@given(u=st.floats(0, 1, exclude_max=True, width=32), shift=st.floats(0.1, 10))
def test_a_shift_moves_times_towards_the_noise(u: float, shift: float) -> None:
    plain = float(Diffusion(DiffusionConfig("flow")).timesteps_from_uniform(torch.tensor([u])))
    moved = float(Diffusion(DiffusionConfig("flow", flow_shift=shift)).timesteps_from_uniform(torch.tensor([u])))
    assert moved == pytest.approx(shift * plain / (1 + (shift - 1) * plain), abs=1e-5)
    assert (moved >= plain - 1e-6) if shift >= 1 else (moved <= plain + 1e-6)


def test_a_shift_may_depend_on_the_resolution() -> None:
    diffusion = Diffusion(DiffusionConfig("flow", flow_shift=1.5, flow_shift_base_pixels=1024))
    u = torch.tensor([0.2, 0.7])
    expected = Diffusion(DiffusionConfig("flow", flow_shift=3.0)).timesteps_from_uniform(u)
    torch.testing.assert_close(diffusion.timesteps_from_uniform(u, latent_pixels=4096), expected)
    with pytest.raises(InputError, match="depends on latent_pixels"):
        diffusion.timesteps_from_uniform(u)


@pytest.mark.parametrize("u", [[-0.1], [1.0], [math.nan]])
def test_numbers_outside_the_unit_interval_are_refused(u: list[float]) -> None:
    with pytest.raises(InputError, match=r"must be in \[0, 1\)"):
        Diffusion(DiffusionConfig("flow")).timesteps_from_uniform(torch.tensor(u))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prediction": "score"}, "prediction = 'score': must be one of eps, v, x0, flow, edm"),
        ({"prediction": "eps", "schedule": "cosin"}, "schedule = 'cosin'"),
        ({"timestep_sampling": "beta"}, "timestep_sampling = 'beta'"),
        ({"loss": "l3"}, "loss = 'l3'"),
        ({"loss_weight": "min_snr", "prediction": "flow"}, "min-SNR weights are for eps, v and x0"),
        ({"loss_weight": "debiased", "prediction": "flow"}, "debiased weights are for eps, v and x0"),
        ({"loss_weight": "min_snr", "prediction": "edm"}, "min-SNR weights are for eps, v and x0"),
        ({"loss_weight": "debiased", "prediction": "eps", "schedule": "cosine"}, "above 10,000"),
        ({"loss_weight": "min_snr", "prediction": "v", "min_snr_gamma": 0}, "above 0"),
        ({"prediction": "v", "beta_start": 0.5, "beta_end": 0.1}, "beta_start <= beta_end"),
        ({"prediction": "v", "beta_start": math.nan}, "beta_start <= beta_end"),
        ({"prediction": "v", "schedule": "cosine", "beta_start": 0.01}, "a cosine has its own"),
        ({"prediction": "eps", "zero_terminal_snr": True}, "noise alone"),
        ({"prediction": "flow", "zero_terminal_snr": True}, "belongs to the discrete process"),
        ({"prediction": "flow", "schedule": "cosine"}, "belongs to the discrete process"),
        ({"prediction": "v", "flow_shift": 3.0}, "belongs to the flow process"),
        ({"prediction": "flow", "sigma_data": 1.0}, "belongs to the edm process"),
        ({"prediction": "edm", "timestep_sampling": "uniform"}, "'log_normal' is for edm"),
        ({"prediction": "v", "timestep_sampling": "log_normal"}, "'log_normal' is for edm"),
        ({"prediction": "edm", "sigma_min": 100.0}, "0 < min < max"),
        ({"flow_shift": math.nan}, "flow_shift = nan: must be above 0"),
        ({"flow_shift_base_pixels": 0}, "flow_shift_base_pixels = 0"),
        ({"offset_noise": -0.1}, "offset_noise = -0.1"),
        ({"input_perturbation": math.inf}, "input_perturbation = inf"),
        ({"huber_delta": 0.0}, "huber_delta = 0.0"),
    ],
)
def test_wrong_combinations_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DiffusionConfig(**values)


def test_debiased_weights_would_be_huge_at_a_cosines_end() -> None:
    """Why they are refused for the noise."""
    snr = Diffusion(DiffusionConfig("v", schedule="cosine")).snr(torch.tensor([999]))
    assert float(snr.rsqrt()) > 10_000


# -- on a device -------------------------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Counts what is taken from the CPU to another device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        self.count += func is torch.ops.aten._to_copy.default and device is not None and args[0].device != device
        return func(*args, **kwargs or {})


def meta(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on a device whose values can't be read: `item`, `bool`, `tolist` and `numpy` are errors there."""
    return tensor.to("meta")


@pytest.mark.parametrize("weight", ["none", "min_snr", "debiased"])
@pytest.mark.parametrize("prediction", ALL)
def test_a_training_step_reads_and_copies_nothing(prediction: Prediction, weight: LossWeight) -> None:
    discrete = prediction in DISCRETE
    config = DiffusionConfig(prediction, loss="huber", loss_weight=weight if discrete else "none", offset_noise=0.1)
    if discrete:  # a table that no other test has taken there
        config = replace(config, beta_start=1.5e-3, beta_end=0.011 + 1e-3 * len(weight) + 1e-4 * len(prediction))
    diffusion, (x0, noise) = Diffusion(config), (meta(part) for part in draws())
    uniform, positions, normal = meta(torch.rand(8)), meta(torch.arange(8)), meta(torch.rand(8, 4))

    def step() -> torch.Tensor:
        t = diffusion.timesteps_from_uniform(stratified(uniform, positions, 8))
        seen = diffusion.perturbed(diffusion.offset(noise, normal), noise)
        noised = diffusion.noised(x0, seen, t)
        inputs = diffusion.scale_input(noised, diffusion.alpha_sigma(t)[1])
        output = inputs + diffusion.model_time(t)[:, None, None, None]
        diffusion.denoised(noised, output, *diffusion.alpha_sigma(t))
        return diffusion.loss(output, x0, noise, t).mean()

    with Copies() as first:
        assert step().device.type == "meta"
    with Copies() as second:
        step()
    assert (first.count, second.count) == (int(discrete), 0)


def test_the_table_on_a_device_is_that_of_the_cpu() -> None:
    diffusion = Diffusion(DiffusionConfig("v"))
    assert diffusion.alphas_cumprod is Diffusion(DiffusionConfig("v")).alphas_cumprod
    alpha, _ = diffusion.alpha_sigma(meta(EVERY_STEP))
    assert (alpha.device.type, alpha.shape) == ("meta", (1000,))
    assert diffusion.alphas_cumprod.device.type == "cpu"
