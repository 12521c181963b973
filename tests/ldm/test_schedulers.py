from __future__ import annotations

import json
from typing import Any

import diffusers
import pytest
import torch

from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.errors import ConfigError
from ldm.interchange.schedulers import diffusion_config, scheduler_config, scheduler_spacing
from ldm.samplers import SAMPLERS


def in_file(scheduler: Any) -> dict[str, Any]:
    """What diffusers writes to scheduler_config.json."""
    values: dict[str, Any] = json.loads(scheduler.to_json_string())
    return values


CONFIGS = [
    DiffusionConfig("flow"),
    DiffusionConfig("flow", flow_shift=3.0),
    DiffusionConfig("v", "linear", 1e-3, 0.01),
    DiffusionConfig("eps", "scaled_linear", 0.00085, 0.012),
    DiffusionConfig("v", "scaled_linear", 0.00085, 0.012, zero_terminal_snr=True),
    DiffusionConfig("x0", "cosine"),
    DiffusionConfig("edm", sigma_data=1.0, sigma_min=0.01, sigma_max=40.0, rho=6.0),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_process_survives_the_schedulers_file(config: DiffusionConfig) -> None:
    assert diffusion_config(scheduler_config(config)) == config


@pytest.mark.parametrize("config", CONFIGS)
def test_diffusers_builds_the_same_process_from_the_file(config: DiffusionConfig) -> None:
    written = scheduler_config(config)
    theirs = getattr(diffusers, written["_class_name"]).from_config(written)
    assert diffusion_config(in_file(theirs)) == config
    theirs.set_timesteps(10)
    levels = SAMPLERS["dpmpp_2m"].levels_of(Diffusion(config), 10, None, None)
    assert theirs.timesteps.tolist() == pytest.approx([level.time for level in levels.levels[:-1]], abs=1e-4)
    if config.is_discrete:
        ratios = [level.sigma / level.alpha for level in levels.levels]
        torch.testing.assert_close(theirs.sigmas, torch.tensor(ratios), rtol=1e-4, atol=1e-6)
    else:
        assert theirs.sigmas.tolist() == pytest.approx([level.sigma for level in levels.levels], rel=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras"])
def test_spacing_survives_the_schedulers_file(spacing: Any) -> None:
    config = DiffusionConfig("v", "scaled_linear", 0.00085, 0.012)
    written = scheduler_config(config, spacing)
    assert scheduler_spacing(written) == spacing
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(written)
    theirs.set_timesteps(10)
    levels = SAMPLERS["dpmpp_2m"].levels_of(Diffusion(config), 10, spacing, None)
    assert theirs.timesteps.tolist() == [level.time for level in levels.levels[:-1]]


def test_schedulers_of_published_models_are_understood() -> None:
    sd1 = diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert diffusion_config(in_file(sd1)).prediction == "eps"
    assert scheduler_spacing(in_file(sd1)) == "leading"
    sd2 = diffusers.DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    assert diffusion_config(in_file(sd2)).prediction == "v"
    zero = diffusers.DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    )
    assert diffusion_config(in_file(zero)).zero_terminal_snr
    assert scheduler_spacing(in_file(zero)) == "trailing"
    cosine = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    assert diffusion_config(in_file(cosine)) == DiffusionConfig("eps", "cosine")
    sd3 = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert diffusion_config(in_file(sd3)) == DiffusionConfig("flow", flow_shift=3.0)
    assert scheduler_spacing(in_file(sd3)) is None
    flow = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, timestep_spacing="leading"
    )
    assert scheduler_spacing(in_file(flow)) is None  # which it doesn't read for flows
    playground = diffusers.EDMDPMSolverMultistepScheduler(sigma_data=0.5)
    assert diffusion_config(in_file(playground)) == DiffusionConfig("edm")
    assert scheduler_spacing(in_file(playground)) == "karras"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rescale_betas_zero_snr": True}, "zero_terminal_snr with prediction = 'eps'"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
        ({"num_train_timesteps": 500}, "num_train_timesteps = 500"),
        ({"prediction_type": "score"}, "prediction_type = 'score'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "only 'epsilon'"),
        ({"_class_name": "EDMEulerScheduler", "sigma_schedule": "exponential"}, "only 'karras'"),
        ({"_class_name": None}, "_class_name = None: must be of type str"),
        ({"prediction_type": ["x"]}, r"prediction_type = \['x'\]: must be of type str"),
        ({"beta_start": "x"}, "beta_start = 'x': must be of type float"),
        ({"beta_end": True}, "beta_end = True: must be of type float"),
        ({"prediction_type": "flow_prediction", "flow_shift": "x"}, "flow_shift = 'x': must be of type float"),
        ({"rescale_betas_zero_snr": "false"}, "rescale_betas_zero_snr = 'false': must be of type bool"),
    ],
)
def test_schedulers_of_other_processes_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        diffusion_config(values)


def test_spacings_that_are_not_known_are_refused() -> None:
    with pytest.raises(ConfigError, match="use_beta_sigmas = True"):
        scheduler_spacing({"use_beta_sigmas": True})
    with pytest.raises(ConfigError, match="timestep_spacing = 'quad'"):
        scheduler_spacing({"timestep_spacing": "quad"})
    with pytest.raises(ConfigError, match=r"timestep_spacing = \['leading'\]: must be of type str \| None"):
        scheduler_spacing({"timestep_spacing": ["leading"]})
    with pytest.raises(ConfigError, match="use_karras_sigmas = True"):
        scheduler_spacing({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True})
    with pytest.raises(ConfigError, match="diffusers has only linspace"):
        scheduler_config(DiffusionConfig("flow"), "trailing")
    with pytest.raises(ConfigError, match="one shift for all sizes"):
        scheduler_config(DiffusionConfig("flow", flow_shift_base_pixels=64))
