from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from solving import our_latents, their_latents
from stock import stock_pipeline

from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.errors import ConfigError
from ldm.generate import text_to_image
from ldm.interchange import diffusion_config, load_model, read_scheduler, save_model, scheduler_config
from ldm.interchange.scheduler_keys import OVERWRITTEN
from ldm.samplers import SAMPLERS, SamplerOptions, get_sampler

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*local_dir_use_symlinks:UserWarning",
    "ignore:The configuration file of (this|the) scheduler:FutureWarning",  # what the stock pipeline overwrites
)

NOISE = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
STABLE_DIFFUSION, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SD1 = SD | {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}
SD2 = SD1 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "clip_sample": False}
SDXL = SD | {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
KARRAS = {"use_karras_sigmas": True}
ZERO_V = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def of(name: str, **values: Any) -> dict[str, Any]:
    """A file of that class, with Stable Diffusion's betas."""
    return SD | {"_class_name": f"{name}Scheduler"} | values


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
    DiffusionConfig("edm", sigma_max=2.0),
]


# -- in ----------------------------------------------------------------------------------------------------------------


PUBLISHED = {
    "sd1": (SD1, "plms", None),
    "sd1-v": (SD1 | {"prediction_type": "v_prediction"}, "plms", None),
    "sd2": (SD2, "ddim", None),
    "sd2-trailing": (SD2 | {"timestep_spacing": "trailing"}, "ddim", "trailing"),
    "zero-snr": (SD2 | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}, "ddim", "trailing"),
    "turbo": (SDXL | {"timestep_spacing": "trailing", "timestep_type": "discrete"}, "euler", "trailing"),
    "xl": (SDXL, "euler", "leading"),
    "xl-offset-0": (SDXL | {"steps_offset": 0}, "euler", "leading"),
    "xl-karras": (SDXL | KARRAS, "euler", "karras"),
    "xl-karras-limits": (SDXL | KARRAS | {"sigma_min": 0.05, "sigma_max": 10.0}, "euler", "karras"),
    "xl-zero-snr": (SDXL | ZERO_V, "euler", "leading"),
    "xl-heun-karras": (SDXL | KARRAS | {"_class_name": "HeunDiscreteScheduler"}, "heun", "karras"),
    "xl-ancestral": (SDXL | {"_class_name": "EulerAncestralDiscreteScheduler"}, "euler_ancestral", "leading"),
    "dpm": (of("DPMSolverMultistep", algorithm_type="dpmsolver++", solver_type="midpoint"), "dpmpp_2m", None),
    "dpm-karras": (of("DPMSolverMultistep", steps_offset=1, **KARRAS), "dpmpp_2m", "karras"),
    "dpm-1": (of("DPMSolverMultistep", solver_order=1), "dpmpp_2m", None),
    "dpm-sde": (of("DPMSolverMultistep", algorithm_type="sde-dpmsolver++", **KARRAS), "dpmpp_2m_sde", "karras"),
    "dpm-sde-1": (of("DPMSolverMultistep", algorithm_type="sde-dpmsolver++", solver_order=1), "dpmpp_2m_sde", None),
    "dpm-cosine": (of("DPMSolverMultistep", **KARRAS) | {"beta_schedule": "squaredcos_cap_v2"}, "dpmpp_2m", "karras"),
    "unipc": (of("UniPCMultistep", timestep_spacing="trailing"), "unipc", "trailing"),
    "unipc-1": (of("UniPCMultistep", solver_order=1), "unipc", None),
    "unipc-karras-limits": (of("UniPCMultistep", sigma_min=0.05, sigma_max=10.0, **KARRAS), "unipc", "karras"),
    "ddpm": (of("DDPM", clip_sample=False, variance_type="fixed_small"), "ddpm", None),
    "ddim-to-no-noise": (of("DDIM", clip_sample=False), "ddim", None),
    "sd3": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "flow_euler", None),
    "flow-unipc": (of("UniPCMultistep", prediction_type="flow_prediction", use_flow_sigmas=True), "unipc", None),
    "playground": ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "dpmpp_2m", "karras"),
    "edm": ({"_class_name": "EDMEulerScheduler", "sigma_max": 2.0}, "euler", "karras"),
}
"""A file, its sampler here and what it says of the spacing."""


def both_latents(values: dict[str, Any], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and diffusers'."""
    found = read_scheduler(values)
    method = get_sampler(found.sampler, options=found.options)
    ours = our_latents(method, Diffusion(found.diffusion), NOISE, steps, found.spacing)
    return ours, their_latents(getattr(diffusers, values["_class_name"]).from_config(values), NOISE, steps)


@pytest.mark.parametrize("steps", [1, 8, 30])
@pytest.mark.parametrize("name", PUBLISHED)
def test_latents_of_published_files_are_those_of_diffusers(name: str, steps: int) -> None:
    values, sampler, spacing = PUBLISHED[name]
    found = read_scheduler(values)
    assert (found.sampler, found.spacing) == (sampler, spacing)
    if (sampler, spacing) == ("ddim", "trailing"):
        steps = {30: 40}.get(steps, steps)  # that divides 1,000: see below
    ours, theirs = both_latents(values, steps)
    # float32 in another order of operations: 3e-5 of the largest was seen.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("values", "steps"),
    [
        (SD2 | {"timestep_spacing": "trailing"}, 30),
        (SD1 | {"timestep_spacing": "trailing"}, 30),
        *((of(f"{name}Discrete"), 1) for name in ("Euler", "EulerAncestral", "Heun")),
        (of("DDPM", clip_sample=False, timestep_spacing="linspace"), 1),
    ],
)
def test_where_diffusers_is_not_followed(values: dict[str, Any], steps: int) -> None:
    """As docs/model.md has it: steps that end elsewhere than the next begins, and a single one from the least noise."""
    ours, theirs = both_latents(values, steps)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) > 2e-3
    found = read_scheduler(values)
    levels = get_sampler(found.sampler, options=found.options).levels_of(
        Diffusion(found.diffusion), steps, found.spacing
    )
    assert levels.levels[0].time == 999


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((STABLE_DIFFUSION, name) for name in ("sd1", "sd2-trailing", "xl-offset-0", "dpm-karras")),
        *((XL, name) for name in ("xl", "xl-offset-0", "xl-karras-limits", "unipc")),
    ],
)
def test_a_folder_samples_as_it_says(kind: str, name: str, tmp_path: Path) -> None:
    """Through the stock pipeline, and through the folder that it saves, with no sampler asked for."""
    stock, values = stock_pipeline(kind), PUBLISHED[name][0] | {"prediction_type": "epsilon"}
    stock.scheduler = getattr(diffusers, values["_class_name"]).from_config(values)
    stock.save_pretrained(tmp_path / "theirs")
    stock = getattr(diffusers, kind).from_pretrained(tmp_path / "theirs")
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    asked: dict[str, Any] = {
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "height": 16,
        "width": 16,
        "output_type": "np",
    }
    theirs = torch.from_numpy(stock(["a red apple"], latents=noise, **asked).images)
    model = load_model(tmp_path / "theirs")
    save_model(model, tmp_path / "ours")
    for each in (model, load_model(tmp_path / "ours")):
        ours = text_to_image(each, ["a red apple"], noise=noise, steps=5, guidance_scale=3.0)
        assert int((ours.int() - (theirs * 255).round().int()).abs().max()) <= 1


def test_another_sampler_takes_the_spacing_and_nothing_else(tmp_path: Path) -> None:
    stock = stock_pipeline(XL)
    stock.scheduler = diffusers.EulerDiscreteScheduler.from_config(SDXL | {"steps_offset": 0})
    stock.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    asked: dict[str, Any] = {"seeds": [1], "steps": 4}
    own = text_to_image(model, ["a red apple"], **asked)
    assert torch.equal(text_to_image(model, ["a red apple"], sampler="euler", **asked), own)
    other = text_to_image(model, ["a red apple"], sampler="ddim", **asked)
    model.sampler, model.sampler_options, model.spacing = None, SamplerOptions(), None
    assert torch.equal(text_to_image(model, ["a red apple"], sampler="ddim", spacing="leading", **asked), other)
    assert not torch.equal(text_to_image(model, ["a red apple"], sampler="euler", spacing="leading", **asked), own)


def test_the_class_is_that_of_the_index(tmp_path: Path) -> None:
    stock = stock_pipeline(STABLE_DIFFUSION)
    stock.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index["scheduler"][1] = "UniPCMultistepScheduler"
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert type(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path).scheduler).__name__ == index["scheduler"][1]
    assert load_model(tmp_path).sampler == "unipc"
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"scheduler_config.json: _class_name = 'LCMScheduler': only DDPMScheduler,"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "kind", [*OVERWRITTEN, "StableDiffusionUpscalePipeline", XL, "StableDiffusionXLInpaintPipeline"]
)
def test_what_stock_pipelines_overwrite_is_known(kind: str) -> None:
    bare = {"steps_offset": 0, "clip_sample": True, "skip_prk_steps": False}
    overwritten: dict[str, Any] = {}
    for name, key in (("DDIM", "steps_offset"), ("DDIM", "clip_sample"), ("PNDM", "skip_prk_steps")):
        pipeline, scheduler = getattr(diffusers, kind), getattr(diffusers, f"{name}Scheduler")(**{key: bare[key]})
        stock = stock_pipeline(kind if kind not in OVERWRITTEN else STABLE_DIFFUSION)
        parts = dict(stock.components) | {"scheduler": scheduler}
        found = pipeline(**parts).scheduler.config[key]
        overwritten |= {} if found == bare[key] else {key: found}
    assert overwritten == OVERWRITTEN.get(kind, {})


def test_defaults_of_an_older_class_are_left_to_the_class() -> None:
    values = of("DDIM", clip_sample=False, set_alpha_to_one=False, _use_default_values=["set_alpha_to_one"])
    assert read_scheduler(values).options.ends_noisy is False
    assert diffusers.DDIMScheduler.from_config(values).config.set_alpha_to_one


REFUSED = [
    (SDXL | {"timestep_type": "continuous"}, "timestep_type = 'continuous': only 'discrete'"),
    (of("LCM"), "_class_name = 'LCMScheduler': only DDPMScheduler, DDIMScheduler"),
    (of("TCD"), "_class_name = 'TCDScheduler'"),
    ({}, "_class_name = None"),
    ({"_class_name": ["x"]}, r"_class_name = \['x'\]"),
    (of("DPMSolverMultistep", prediction_type="flow_prediction"), "use_flow_sigmas = False with prediction_type"),
    (of("UniPCMultistep", use_flow_sigmas=True), "use_flow_sigmas = True with prediction_type = 'epsilon'"),
    (of("EulerDiscrete", prediction_type="flow_prediction"), "prediction_type = 'flow_prediction': only 'epsilon'"),
    (SDXL | {"interpolation_type": "log_linear"}, "interpolation_type = 'log_linear'"),
    (SDXL | {"use_karras_sigmas": 1}, "use_karras_sigmas = 1: only False or True"),
    (SDXL | {"use_karras_sigmas": None}, "use_karras_sigmas = None: only False or True"),
    (SDXL | {"use_beta_sigmas": True}, "use_beta_sigmas = True"),
    (SDXL | {"final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min'"),
    (SDXL | {"steps_offset": 7}, "steps_offset = 7: only 0 or 1"),
    (SDXL | {"timestep_spacing": "quad"}, "timestep_spacing = 'quad'"),
    (SDXL | {"timestep_spacing": ["leading"]}, r"timestep_spacing = \['leading'\]"),
    (SDXL | {"noise_offset": 0.1}, "noise_offset = 0.1 is not a key of EulerDiscreteScheduler"),
    (SDXL | KARRAS | {"sigma_min": 20.0}, "sigma_min = 20.0, sigma_max = None: noise must fall"),
    (of("DDIM"), "clip_sample = True, as DDIMScheduler has it where the file has none: only False"),
    (SD2 | {"timestep_spacing": "linspace"}, "timestep_spacing = 'linspace': only 'leading' or 'trailing'"),
    (SD2 | {"thresholding": True}, "thresholding = True"),
    (SD1 | {"skip_prk_steps": False}, "skip_prk_steps = False"),
    (of("PNDM"), "skip_prk_steps = False, as PNDMScheduler has it"),
    (of("DDPM", clip_sample=False, variance_type="fixed_large"), "variance_type = 'fixed_large'"),
    (of("DPMSolverMultistep", solver_order=3), "solver_order = 3: only 2 or 1"),
    (of("DPMSolverMultistep", solver_type="heun"), "solver_type = 'heun'"),
    (of("DPMSolverMultistep", algorithm_type="dpmsolver"), "algorithm_type = 'dpmsolver'"),
    (of("DPMSolverMultistep", use_lu_lambdas=True), "use_lu_lambdas = True"),
    (of("DPMSolverMultistep", lambda_min_clipped=-5.1), "lambda_min_clipped = -5.1"),
    (of("UniPCMultistep", disable_corrector=[0]), r"disable_corrector = \[0\]"),
    (of("UniPCMultistep", lower_order_final=False), "lower_order_final = False"),
    (SDXL | {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True with prediction_type = 'epsilon'"),
    (SDXL | {"rescale_betas_zero_snr": "false"}, "rescale_betas_zero_snr = 'false'"),
    (SDXL | {"beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
    (SDXL | {"trained_betas": [0.1] * 1000}, "trained_betas"),
    (SDXL | {"beta_start": "x"}, "beta_start = 'x': must be of type float"),
    (SDXL | {"beta_end": True}, "beta_end = True: must be of type float"),
    (SDXL | {"num_train_timesteps": 500}, "num_train_timesteps = 500"),
    (SDXL | {"prediction_type": "score"}, "prediction_type = 'score'"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": -1.0}, "shift = -1.0: must be above 0"),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas = True"),
    ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "only 'epsilon'"),
    ({"_class_name": "EDMEulerScheduler", "sigma_schedule": "exponential"}, "only 'karras'"),
    ({"_class_name": "EDMEulerScheduler", "sigma_max": None}, "sigma_max = None: must be of type float"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_would_sample_otherwise_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_scheduler(values)


def test_null_keys_of_older_files_say_nothing() -> None:
    assert read_scheduler(SD1 | {"timestep_values": None}) == read_scheduler(SD1)


def test_what_noises_is_read_for_its_process_alone() -> None:
    x4 = diffusers.DDPMScheduler(beta_schedule="scaled_linear", variance_type="fixed_large", thresholding=True)
    assert diffusion_config(in_file(x4)) == DiffusionConfig("eps", "scaled_linear", 1e-4, 0.02)
    assert diffusion_config({"_class_name": "PNDMScheduler"}) == DiffusionConfig("eps", "linear", 1e-4, 0.02)
    with pytest.raises(ConfigError, match="_class_name = 'EulerDiscreteScheduler': only DDPMScheduler"):
        diffusion_config(SDXL)
    with pytest.raises(ConfigError, match="trained_betas"):
        diffusion_config(in_file(x4) | {"trained_betas": [0.1]})
    with pytest.raises(ConfigError, match="noise_offset = 1"):
        diffusion_config(in_file(x4) | {"noise_offset": 1})


# -- out ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_diffusers_builds_the_same_process_from_the_file(config: DiffusionConfig) -> None:
    written = scheduler_config(config)
    theirs = getattr(diffusers, written["_class_name"]).from_config(written)
    assert read_scheduler(in_file(theirs)).diffusion == read_scheduler(written).diffusion == config
    theirs.set_timesteps(10)
    levels = SAMPLERS["dpmpp_2m"].levels_of(Diffusion(config), 10, None, None)
    assert theirs.timesteps.tolist() == pytest.approx([level.time for level in levels.levels[:-1]], abs=1e-4)
    if config.is_discrete:
        ratios = [level.sigma / level.alpha for level in levels.levels]
        torch.testing.assert_close(theirs.sigmas, torch.tensor(ratios), rtol=1e-4, atol=1e-6)
    else:
        assert theirs.sigmas.tolist() == pytest.approx([level.sigma for level in levels.levels], rel=1e-5)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace", "karras"])
@pytest.mark.parametrize("sampler", [None, *SAMPLERS])
def test_what_is_written_samples_the_same_in_diffusers_or_is_refused(
    sampler: str | None, spacing: Any, config: DiffusionConfig
) -> None:
    try:
        written = scheduler_config(config, spacing, sampler)
    except ConfigError:
        written = None
    if written is None:
        assert (spacing, sampler) != (None, None)
        return
    # diffusers' Heun goes through x/α, up to 20,000 on a cosine: 9e-3 were seen in float32, 1.2e-3 in float64.
    noise = NOISE.double() if sampler == "heun" else NOISE
    theirs = their_latents(getattr(diffusers, written["_class_name"]).from_config(written), noise, 8)
    ours = our_latents(get_sampler(sampler or "dpmpp_2m"), Diffusion(config), noise, 8, spacing)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3 * float(theirs.abs().max()))
    found = read_scheduler(json.loads(json.dumps(written)))
    if spacing is not None and config.is_discrete:
        assert found.spacing == spacing
    assert found.sampler in (sampler or "dpmpp_2m", f"flow_{sampler}")


@pytest.mark.parametrize(("sampler", "spacing"), [("ddim", "trailing"), ("euler", "karras"), ("heun", None)])
def test_the_usual_samplers_are_written(sampler: str, spacing: Any) -> None:
    assert scheduler_config(DiffusionConfig("v"), spacing, sampler)["_class_name"].lower().startswith(sampler)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_that_was_read_is_written_to_the_same_effect(name: str) -> None:
    found = read_scheduler(PUBLISHED[name][0])
    written = scheduler_config(found.diffusion, found.spacing, found.sampler, found.options)
    again = read_scheduler(json.loads(json.dumps(written)))
    assert (again.diffusion, again.sampler) == (found.diffusion, found.sampler)
    levels = [
        get_sampler(each.sampler, options=each.options).levels_of(Diffusion(each.diffusion), 12, each.spacing)
        for each in (found, again)
    ]
    assert levels[0] == levels[1]


def test_what_diffusers_has_not_is_not_written() -> None:
    with pytest.raises(ConfigError, match="spacing = 'trailing' with prediction = 'flow' and sampler = 'dpmpp_2m'"):
        scheduler_config(DiffusionConfig("flow"), "trailing")
    with pytest.raises(ConfigError, match="one shift for all sizes"):
        scheduler_config(DiffusionConfig("flow", flow_shift_base_pixels=64))
    with pytest.raises(ConfigError, match="sampler = 'unipc' with prediction = 'edm': diffusers has no scheduler"):
        scheduler_config(DiffusionConfig("edm"), sampler="unipc")
    with pytest.raises(ConfigError, match="spacing = None with prediction = 'v' and sampler = 'plms'"):
        scheduler_config(DiffusionConfig("v"), sampler="plms")
    from_0 = SamplerOptions(leading_from=0)
    assert scheduler_config(DiffusionConfig("v"), "leading", "euler", from_0, XL)["steps_offset"] == 0
    with pytest.raises(ConfigError, match="would sample otherwise"):  # the stock pipeline begins from 1
        scheduler_config(DiffusionConfig("v"), "leading", "euler", from_0, STABLE_DIFFUSION)
