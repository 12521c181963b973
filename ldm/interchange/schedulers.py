"""diffusers' scheduler_config.json: the process that it stands for, in and out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldm.diffusion import NUM_STEPS, DiffusionConfig, Prediction
from ldm.errors import ConfigError

PREDICTIONS: dict[str, Prediction] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
    "flow_prediction": "flow",
}
"""diffusers' names of what the network predicts, and ours."""


def scheduler_config(config: DiffusionConfig) -> dict[str, Any]:
    """The scheduler_config.json with which diffusers solves this process as `dpmpp_2m` does."""
    common = {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "num_train_timesteps": NUM_STEPS,
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[config.prediction],
        "solver_order": 2,
        "solver_type": "midpoint",
        # Without effect on this solver's levels; the pipeline overwrites any other value, with a warning.
        "steps_offset": 1,
    }
    if config.is_flow:
        return common | {"flow_shift": 1.0, "use_flow_sigmas": True}
    start, end = config.betas
    return common | {"beta_end": end, "beta_schedule": config.schedule, "beta_start": start}


def diffusion_config(scheduler: Mapping[str, Any]) -> DiffusionConfig:
    """The process that any diffusers scheduler's scheduler_config.json stands for; which solver it names is left out.

    Raises `ConfigError` for a process that is not supported here.
    """
    name = scheduler.get("_class_name", "")
    steps = scheduler.get("num_train_timesteps", NUM_STEPS)
    if steps != NUM_STEPS:
        raise ConfigError(f"num_train_timesteps = {steps}: only {NUM_STEPS} is supported")
    default = "flow_prediction" if name.startswith("FlowMatch") else "epsilon"
    theirs = scheduler.get("prediction_type", default)
    if theirs not in PREDICTIONS:
        raise ConfigError(f"prediction_type = {theirs!r}: must be one of {', '.join(PREDICTIONS)}")
    refused = {"trained_betas": None, "rescale_betas_zero_snr": False, "flow_shift": 1.0, "shift": 1.0}
    refused |= {"use_dynamic_shifting": False, "thresholding": False, "shift_terminal": None}
    for key, only in refused.items():
        if scheduler.get(key, only) != only:
            raise ConfigError(f"{key} = {scheduler[key]!r}: only {only!r} is supported")
    if PREDICTIONS[theirs] == "flow":
        return DiffusionConfig(prediction="flow")
    return DiffusionConfig(
        prediction=PREDICTIONS[theirs],
        schedule=scheduler.get("beta_schedule", "linear"),
        beta_start=scheduler.get("beta_start", 1e-4),
        beta_end=scheduler.get("beta_end", 0.02),
    )
