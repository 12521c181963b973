"""diffusers' scheduler_config.json, in and out: the process that it stands for, and how a folder samples from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.diffusion import NUM_STEPS, Diffusion, DiffusionConfig, Prediction, Schedule
from ldm.errors import ConfigError
from ldm.interchange.scheduler_keys import BETAS, CLASSES, OVERWRITTEN, ZERO_SNR, checked
from ldm.samplers import SamplerOptions, Spacing, get_sampler

PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}
"""diffusers' names of what the network predicts, and ours."""

SCHEDULES: dict[str, Schedule] = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
"""diffusers' names of the schedules, and ours."""

EDM_KEYS = ("sigma_min", "sigma_max", "sigma_data", "rho")

SAMPLERS = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "plms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
    "FlowMatchEulerDiscreteScheduler": "flow_euler",
    "FlowMatchHeunDiscreteScheduler": "flow_heun",
    "EDMEulerScheduler": "euler",
    "EDMDPMSolverMultistepScheduler": "dpmpp_2m",
}
"""diffusers' classes, and our names of their solvers."""

NOISING = ("DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
"""Classes that noise as α·x₀ + σ·ε; the others as x₀ + σ/α·ε."""


@dataclass(frozen=True)
class Sampling:
    """What a scheduler_config.json says."""

    diffusion: DiffusionConfig
    sampler: str
    """One of `ldm.samplers.SAMPLERS`."""
    spacing: Spacing | None
    """Spacing of the levels. None where the file says nothing of it, and the sampler's own is diffusers'."""
    options: SamplerOptions


def read_scheduler(
    scheduler: Mapping[str, Any], class_name: str | None = None, pipeline: str | None = None
) -> Sampling:
    """The process and the sampler that a scheduler_config.json stands for.

    `class_name` is the class in model_index.json, which is the one that diffusers builds; None: that of the file.
    `pipeline` is the stock pipeline's name: some take other values than the file has.

    Raises `ConfigError` for a class or an unknown key, and for each value with which diffusers would sample otherwise.
    """
    name, values = checked(scheduler, class_name, OVERWRITTEN.get(pipeline or "", {}))
    diffusion = _process(name, values)
    sampler = "dpmpp_2m_sde" if values.get("algorithm_type") == "sde-dpmsolver++" else SAMPLERS[name]
    if diffusion.is_edm:
        return Sampling(diffusion, sampler, "karras", SamplerOptions(order=values.get("solver_order", 2)))
    karras, even = values.get("use_karras_sigmas", False), values.get("timestep_spacing")
    if diffusion.is_flow:
        if karras:
            raise ConfigError("use_karras_sigmas = True with a flow: only False is supported")
        return Sampling(diffusion, sampler, None, SamplerOptions(order=values.get("solver_order", 2)))
    said = "timestep_spacing" in scheduler or diffusion.zero_terminal_snr
    options = SamplerOptions(
        leading_from=values["steps_offset"] if even == "leading" else None,
        ends_noisy=not values["set_alpha_to_one"] if "set_alpha_to_one" in values else None,
        karras_within=even if even and karras and sampler in ("euler", "heun") else "linspace",
        sigma_min=values["sigma_min"] if karras else None,
        sigma_max=values["sigma_max"] if karras else None,
        order=values.get("solver_order", 2),
        mixes_velocities=sampler == "plms" and diffusion.prediction == "v",
    )
    if karras:
        _check_limits(diffusion, sampler, options)
    return Sampling(diffusion, sampler, "karras" if karras else even if said else None, options)


def _check_limits(diffusion: DiffusionConfig, sampler: str, options: SamplerOptions) -> None:
    limits = (options.sigma_min, options.sigma_max)
    if all(limit is None or 0 < limit < float("inf") for limit in limits):
        levels = get_sampler(sampler, options=options).levels_of(Diffusion(diffusion), 2, "karras").levels
        if levels[0].sigma > levels[1].sigma:
            return
    raise ConfigError(
        f"sigma_min = {limits[0]}, sigma_max = {limits[1]}: noise must fall from one to the other, above 0"
    )


def diffusion_config(scheduler: Mapping[str, Any], class_name: str | None = None) -> DiffusionConfig:
    """The discrete process with which a scheduler noises images; how it would sample is left out.

    Raises `ConfigError` for a class that noises otherwise, and a process that is not supported here.
    """
    name = scheduler.get("_class_name") if class_name is None else class_name
    if name not in NOISING:
        raise ConfigError(f"_class_name = {name!r}: only {', '.join(NOISING)} are supported, to noise with")
    process = {*BETAS, *ZERO_SNR, "prediction_type"}
    solver = {key: rule.default for key, rule in CLASSES[name].items() if key not in process}
    _, values = checked(scheduler, name, solver | {"clip_sample": False, "skip_prk_steps": True})
    return _process(name, values)


def _process(name: str, values: Mapping[str, Any]) -> DiffusionConfig:
    if name.startswith("EDM"):
        return DiffusionConfig("edm", **{key: values[key] for key in EDM_KEYS})
    if name.startswith("FlowMatch"):
        return DiffusionConfig("flow", flow_shift=_shift("shift", values))
    prediction, flows = PREDICTIONS[values["prediction_type"]], values.get("use_flow_sigmas", False)
    if flows != (prediction == "flow"):
        raise ConfigError(
            f"use_flow_sigmas = {flows} with prediction_type = {values['prediction_type']!r}: a flow takes both,"
            " and nothing else either"
        )
    if not 0 < values["beta_start"] <= values["beta_end"] < 1:
        betas = f"beta_start = {values['beta_start']}, beta_end = {values['beta_end']}"
        raise ConfigError(f"{betas}: must be 0 < beta_start <= beta_end < 1")
    if prediction == "flow":
        return DiffusionConfig("flow", flow_shift=_shift("flow_shift", values))
    zero = values.get("rescale_betas_zero_snr", False)
    if zero and prediction == "eps":
        raise ConfigError(
            "rescale_betas_zero_snr = True with prediction_type = 'epsilon': zero_terminal_snr with prediction = 'eps',"
            " where the noise alone says nothing of x0"
        )
    schedule = SCHEDULES[values["beta_schedule"]]
    cosine = schedule == "cosine"
    return DiffusionConfig(
        prediction=prediction,
        schedule=schedule,
        beta_start=None if cosine else values["beta_start"],
        beta_end=None if cosine else values["beta_end"],
        zero_terminal_snr=zero,
    )


def _shift(key: str, values: Mapping[str, Any]) -> float:
    if not 0 < values[key] < float("inf"):
        raise ConfigError(f"{key} = {values[key]}: must be above 0")
    return float(values[key])


# -- out ---------------------------------------------------------------------------------------------------------------


def scheduler_config(
    config: DiffusionConfig,
    spacing: Spacing | None = None,
    sampler: str | None = None,
    options: SamplerOptions | None = None,
    pipeline: str | None = None,
) -> dict[str, Any]:
    """The scheduler_config.json with which a stock pipeline samples this process as that sampler does, `dpmpp_2m` if
    none is named; `spacing` and `options` are the sampler's own if None.

    Raises `ConfigError` for a flow whose shift depends on the resolution, and where diffusers has no such scheduler.
    """
    if config.flow_shift_base_pixels is not None:
        raise ConfigError("flow_shift_base_pixels: diffusers' solvers have one shift for all sizes, leave it out")
    sampler = sampler or "dpmpp_2m"
    method = get_sampler(sampler, options=options)
    name = _class_of(config, sampler)
    written = {"_class_name": name} | _process_keys(config, name)
    written |= _solver_keys(config, name, sampler, spacing, options or SamplerOptions())
    # What has been written is held against what would be read, level by level.
    found = read_scheduler(written, pipeline=pipeline)
    theirs = get_sampler(found.sampler, options=found.options)
    chosen, wanted = (options or SamplerOptions(), Sampling(config, sampler, spacing, SamplerOptions()))
    levels = [
        each.levels_of(Diffusion(said.diffusion), 10, said.spacing)
        for each, said in ((method, wanted), (theirs, found))
    ]
    solvers = [(each.order, each.mixes_velocities) for each in (chosen, found.options)]
    if levels[0] != levels[1] or solvers[0] != solvers[1]:
        raise ConfigError(
            f"spacing = {spacing!r} with prediction = {config.prediction!r} and sampler = {sampler!r}: {name} of"
            " diffusers would sample otherwise"
        )
    return written


def _class_of(config: DiffusionConfig, sampler: str) -> str:
    if config.is_edm:
        known = {"euler": "EDMEulerScheduler"} | dict.fromkeys(
            ("dpmpp_2m", "dpmpp_2m_sde"), "EDMDPMSolverMultistepScheduler"
        )
    elif config.is_flow:
        known = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunDiscreteScheduler"}
        known |= {f"flow_{name}": theirs for name, theirs in known.items()} | {"unipc": "UniPCMultistepScheduler"}
        known |= dict.fromkeys(("dpmpp_2m", "dpmpp_2m_sde"), "DPMSolverMultistepScheduler")
    else:
        known = {ours: theirs for theirs, ours in SAMPLERS.items() if not theirs.startswith(("FlowMatch", "EDM"))}
        known["dpmpp_2m_sde"] = "DPMSolverMultistepScheduler"
    if sampler not in known:
        raise ConfigError(
            f"sampler = {sampler!r} with prediction = {config.prediction!r}: diffusers has no scheduler for it, only"
            f" for {', '.join(known)}"
        )
    return known[sampler]


def _process_keys(config: DiffusionConfig, name: str) -> dict[str, Any]:
    if config.is_edm:
        return {"prediction_type": "epsilon"} | {key: getattr(config, key) for key in EDM_KEYS}
    if name.startswith("FlowMatch"):
        return {"shift": config.flow_shift}
    keys: dict[str, Any] = {
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[config.prediction]
    }
    if config.is_flow:
        return keys | {"flow_shift": config.flow_shift, "use_flow_sigmas": True}
    if config.betas is not None:
        keys |= {"beta_start": config.betas[0], "beta_end": config.betas[1]}
    if config.zero_terminal_snr:
        keys["rescale_betas_zero_snr"] = True
    return keys | {"beta_schedule": {ours: theirs for theirs, ours in SCHEDULES.items()}[config.schedule]}


def _solver_keys(
    config: DiffusionConfig, name: str, sampler: str, spacing: Spacing | None, options: SamplerOptions
) -> dict[str, Any]:
    known = CLASSES[name]
    whole_steps = "set_alpha_to_one" in known or name == "DDPMScheduler"
    if spacing is None and whole_steps and config.zero_terminal_snr:
        spacing = "trailing"
    noisy = spacing in (None, "leading") if options.ends_noisy is None else options.ends_noisy
    sde = sampler == "dpmpp_2m_sde"
    fixed: dict[str, Any] = {
        "num_train_timesteps": NUM_STEPS,
        "algorithm_type": "sde-dpmsolver++" if sde else "dpmsolver++",
        "final_sigmas_type": "zero",
        "solver_order": options.order,
        "solver_type": "bh2" if name.startswith("UniPC") else "midpoint",
        "clip_sample": False,
        "skip_prk_steps": True,
        "set_alpha_to_one": not noisy,
        # Without effect but for `leading`; some pipelines overwrite any other value, with a warning.
        "steps_offset": 1 if options.leading_from is None else options.leading_from,
    }
    keys = {key: value for key, value in fixed.items() if key in known}
    if config.is_flow or config.is_edm:
        return keys
    if spacing == "karras":
        limits = {key: getattr(options, key) for key in ("sigma_min", "sigma_max") if getattr(options, key) is not None}
        within = {"timestep_spacing": options.karras_within} if sampler in ("euler", "heun") else {}
        return keys | {"use_karras_sigmas": True} | limits | within
    return keys | ({} if spacing is None else {"timestep_spacing": spacing})
