"""diffusers' scheduler_config.json: the process that it stands for, in and out, and how times are spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from ldm.config import is_of, kind_name
from ldm.diffusion import NUM_STEPS, DiffusionConfig, Prediction, Schedule
from ldm.errors import ConfigError
from ldm.samplers.levels import Spacing

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

KINDS: dict[str, Any] = {
    **dict.fromkeys(("_class_name", "prediction_type", "beta_schedule"), str),
    **dict.fromkeys(("beta_start", "beta_end", "flow_shift", "shift"), float),
    **dict.fromkeys(EDM_KEYS, float | None),
    **dict.fromkeys(("rescale_betas_zero_snr", "use_karras_sigmas"), bool),
    "timestep_spacing": str | None,
}
"""Of the values that are read."""


def scheduler_config(config: DiffusionConfig, spacing: Spacing | None = None) -> dict[str, Any]:
    """The scheduler_config.json with which diffusers solves this process as `dpmpp_2m` does, with that spacing (None:
    the sampler's own).

    Raises `ConfigError` for a flow whose shift depends on the resolution, and for a spacing that diffusers' scheduler
    of the process has not.
    """
    common = {
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "num_train_timesteps": NUM_STEPS,
        "solver_order": 2,
        "solver_type": "midpoint",
    }
    if config.is_edm:
        _check_spacing(spacing, ("karras",), config)
        edm = {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"}
        return common | edm | {key: getattr(config, key) for key in EDM_KEYS}
    common |= {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[config.prediction],
        # Without effect on this solver's usual levels; the pipeline overwrites any other value, with a warning.
        "steps_offset": 1,
    }
    if config.is_flow:
        _check_spacing(spacing, ("linspace",), config)
        if config.flow_shift_base_pixels is not None:
            raise ConfigError("flow_shift_base_pixels: diffusers' solver has one shift for all sizes, leave it out")
        return common | {"flow_shift": config.flow_shift, "use_flow_sigmas": True}
    if config.betas is not None:
        common |= {"beta_start": config.betas[0], "beta_end": config.betas[1]}
    if config.zero_terminal_snr:
        common["rescale_betas_zero_snr"] = True
    if spacing == "karras":
        common["use_karras_sigmas"] = True
    elif spacing is not None:
        common["timestep_spacing"] = spacing
    return common | {"beta_schedule": {ours: theirs for theirs, ours in SCHEDULES.items()}[config.schedule]}


def diffusion_config(scheduler: Mapping[str, Any]) -> DiffusionConfig:
    """The process that any diffusers scheduler's scheduler_config.json stands for; which solver it names is left out.

    Raises `ConfigError` for a process that is not supported here, and for values of a wrong type.
    """
    _check_kinds(scheduler)
    name = scheduler.get("_class_name", "")
    steps = scheduler.get("num_train_timesteps", NUM_STEPS)
    if steps != NUM_STEPS:
        raise ConfigError(f"num_train_timesteps = {steps}: only {NUM_STEPS} is supported")
    default = "flow_prediction" if name.startswith("FlowMatch") else "epsilon"
    theirs = scheduler.get("prediction_type", default)
    if theirs not in PREDICTIONS:
        raise ConfigError(f"prediction_type = {theirs!r}: must be one of {', '.join(PREDICTIONS)}")
    refused = {"trained_betas": None, "use_dynamic_shifting": False, "thresholding": False, "shift_terminal": None}
    refused |= {"invert_sigmas": False, "stochastic_sampling": False}
    _check_values(scheduler, refused)
    if name.startswith("EDM"):
        _check_values(scheduler, {"prediction_type": "epsilon", "sigma_schedule": "karras"})
        return DiffusionConfig("edm", **{key: scheduler[key] for key in EDM_KEYS if scheduler.get(key) is not None})
    if PREDICTIONS[theirs] == "flow":
        return DiffusionConfig("flow", flow_shift=scheduler.get("flow_shift", scheduler.get("shift", 1.0)))
    schedule = scheduler.get("beta_schedule", "linear")
    if schedule not in SCHEDULES:
        raise ConfigError(f"beta_schedule = {schedule!r}: must be one of {', '.join(SCHEDULES)}")
    cosine = SCHEDULES[schedule] == "cosine"
    return DiffusionConfig(
        prediction=PREDICTIONS[theirs],
        schedule=SCHEDULES[schedule],
        beta_start=None if cosine else scheduler.get("beta_start", 1e-4),
        beta_end=None if cosine else scheduler.get("beta_end", 0.02),
        zero_terminal_snr=scheduler.get("rescale_betas_zero_snr", False),
    )


def scheduler_spacing(scheduler: Mapping[str, Any]) -> Spacing | None:
    """How a scheduler_config.json spaces the times, None where it has nothing to say of it: the sampler's own.

    diffusers goes through a flow in even steps, whatever its `timestep_spacing`. Raises `ConfigError` for a spacing
    that is not known here, and for values of a wrong type.
    """
    _check_kinds(scheduler)
    name = scheduler.get("_class_name", "")
    _check_values(scheduler, {"use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False})
    if name.startswith("FlowMatch") or scheduler.get("prediction_type") == "flow_prediction":
        _check_values(scheduler, {"use_karras_sigmas": False})
        return None
    if scheduler.get("use_karras_sigmas", False) or name.startswith("EDM"):
        return "karras"
    spacing: Spacing | None = scheduler.get("timestep_spacing")
    if spacing is not None and spacing not in ("leading", "trailing", "linspace"):
        raise ConfigError(f"timestep_spacing = {spacing!r}: must be one of {', '.join(get_args(Spacing)[:3])}")
    return spacing


def _check_kinds(scheduler: Mapping[str, Any]) -> None:
    for key, kind in KINDS.items():
        if key in scheduler and not is_of(scheduler[key], kind):
            raise ConfigError(f"{key} = {scheduler[key]!r}: must be of type {kind_name(kind)}")


def _check_values(scheduler: Mapping[str, Any], only_values: Mapping[str, Any]) -> None:
    for key, only in only_values.items():
        if scheduler.get(key, only) != only:
            raise ConfigError(f"{key} = {scheduler[key]!r}: only {only!r} is supported")


def _check_spacing(spacing: Spacing | None, known: tuple[Spacing, ...], config: DiffusionConfig) -> None:
    if spacing is not None and spacing not in known:
        raise ConfigError(
            f"spacing = {spacing!r} with prediction = {config.prediction!r}: diffusers has only {', '.join(known)}"
        )
