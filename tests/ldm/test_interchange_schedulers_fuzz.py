"""Every key of every scheduler of diffusers: sampled as it says, or refused by name."""

from __future__ import annotations

import inspect
import json
import math
import random
import typing
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from solving import our_latents, their_latents

from ldm.diffusion import Diffusion
from ldm.errors import ConfigError
from ldm.interchange.scheduler_keys import CLASSES
from ldm.interchange.schedulers import read_scheduler
from ldm.samplers import get_sampler

STEPS = 5
NOISE = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
TOLERANCE = 2e-3
"""Of the largest latent. diffusers' Euler and Heun go through x/α, which is up to 20,000 on a cosine."""

SCHEDULERS = sorted(
    {each.name for each in KarrasDiffusionSchedulers}
    | {name for name in dir(diffusers) if name.endswith("Scheduler") and name.startswith(("EDM", "FlowM"))}
    | {"LCMScheduler", "TCDScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "DDIMInverseScheduler"}
    | {"SASolverScheduler", "IPNDMScheduler", "CogVideoXDDIMScheduler", "SCMScheduler", "RePaintScheduler"}
)
KEYS = {
    name: {
        key: each
        for key, each in inspect.signature(getattr(diffusers, name).__init__).parameters.items()
        if key != "self" and each.default is not inspect.Parameter.empty
    }
    for name in SCHEDULERS
}

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
FLOWS = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
MORE: dict[str, list[Any]] = {
    "num_train_timesteps": [500, 1000.0],
    "beta_start": [1e-4, 0.5, -1, "x"],
    "beta_end": [0.02, 1e-5, 2],
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp", "other", None],
    "trained_betas": [[0.001] * 1000, [], None],
    "prediction_type": ["epsilon", "v_prediction", "sample", "flow_prediction", "original_sample", "other", None],
    "timestep_spacing": ["leading", "trailing", "linspace", "other", None],
    "steps_offset": [0, 1, 2, -1, 0.5],
    "solver_order": [1, 2, 3, 0],
    "solver_type": ["midpoint", "heun", "bh1", "bh2", "logrho", "other"],
    "algorithm_type": ["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis", "other"],
    "final_sigmas_type": ["zero", "sigma_min", "other"],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range", None],
    "interpolation_type": ["linear", "log_linear", "other"],
    "lambda_min_clipped": [-math.inf, -5.1, -1.0],
    "sigma_min": [0.002, 0.2, 30.0, 0, -1, math.nan],
    "sigma_max": [80.0, 5.0, 2.0, 0.01, 0, math.inf],
    "sigma_data": [0.5, 1.0, 0],
    "sigma_schedule": ["karras", "exponential", "other"],
    "rho": [7.0, 3.0, 0],
    "disable_corrector": [[], [0, 1]],
    "shift": [1.0, 3.0, 0, -2],
    "flow_shift": [1.0, 3.0, 0, -2],
    "shift_terminal": [None, 0.1, 0],
    "clip_sample_range": [0.5],
    "dynamic_thresholding_ratio": [0.5],
    "sample_max_value": [0.3],
}
"""Beside both flags, the default, null and what the annotation lists."""


def bases(name: str) -> list[dict[str, Any]]:
    """Files that are understood, from which each key is changed."""
    if name.startswith(("EDM", "FlowM")):
        return [{}]
    least = dict(SD)
    if name == "PNDMScheduler":
        least["skip_prk_steps"] = True
    found = [least, least | {"prediction_type": "v_prediction", "timestep_spacing": "leading", "steps_offset": 1}]
    if "use_karras_sigmas" in KEYS[name]:
        found.append(least | {"use_karras_sigmas": True, "timestep_spacing": "trailing"})
    if "use_flow_sigmas" in KEYS[name]:
        found.append(least | FLOWS)
    if "rescale_betas_zero_snr" in KEYS[name]:
        found.append(found[1] | {"rescale_betas_zero_snr": True})
    return found


def values_of(name: str, key: str) -> list[Any]:
    default, annotation = KEYS[name][key].default, str(KEYS[name][key].annotation)
    hint = typing.get_type_hints(getattr(diffusers, name).__init__).get(key)
    listed = [value for each in (hint, *typing.get_args(hint)) for value in typing.get_args(each)]
    values = [default, *MORE.get(key, [None]), *(value for value in listed if isinstance(value, str))]
    if "bool" in annotation:
        values += [True, False]
    return [value for index, value in enumerate(values) if value not in values[:index]]


def judged(name: str, values: dict[str, Any], changed: list[str]) -> str:
    """ "same" or "refused"; anything else is what the test is for."""
    values = json.loads(json.dumps(values | {"_class_name": name}))
    told = {key: values.get(key) for key in changed}
    refusal = None
    try:
        found = read_scheduler(values)
        method = get_sampler(found.sampler, options=found.options)
        ours = our_latents(method, Diffusion(found.diffusion), NOISE, STEPS, found.spacing)
    except ConfigError as error:
        refusal = str(error)
    if refusal is not None:
        assert any(key in refusal for key in changed), f"{name}, {told}: {refusal}"
        return "refused"
    scheduler = getattr(diffusers, name).from_config(values)
    theirs = their_latents(scheduler, NOISE, STEPS)
    assert theirs.isfinite().all(), f"{name}, {told}: diffusers gives no numbers"
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    assert difference < TOLERANCE, f"{name}, {told} of {values}: {difference:.2g}"
    return "same"


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_value_of_every_key_is_honoured_or_refused_by_name(name: str) -> None:
    counts = {"same": 0, "refused": 0}
    for base in bases(name):
        assert judged(name, base, []) == "same"
        for key in base:  # left to the class
            judged(name, {other: value for other, value in base.items() if other != key}, [key])
        for key in KEYS[name]:
            for value in values_of(name, key):
                counts[judged(name, base | {key: value}, [key])] += 1
    assert min(counts.values()) > 2


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_pairs_of_keys_are_honoured_or_refused_by_name(name: str) -> None:
    draw = random.Random(name)
    for _ in range(60):
        base = draw.choice(bases(name))
        changed = {key: draw.choice(values_of(name, key)) for key in draw.sample(sorted(KEYS[name]), 2)}
        judged(name, base | changed, list(changed))


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_keys_of_other_classes_are_read_as_diffusers_reads_them(name: str) -> None:
    """Which is not at all, but for the limits of karras."""
    others = {key: values_of(other, key)[-1] for other in SCHEDULERS for key in KEYS[other] if key not in KEYS[name]}
    for key, value in others.items():
        for base in bases(name)[:3]:
            judged(name, base | {key: value}, [key])


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name not in CLASSES])
def test_other_classes_are_refused_with_those_that_are_supported(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"_class_name = '{name}'.*EulerDiscreteScheduler"):
        read_scheduler({"_class_name": name} | SD)


def test_every_class_of_pipelines_is_either_supported_or_known_not_to_be() -> None:
    assert CLASSES.keys() <= set(SCHEDULERS)
    assert {"LCMScheduler", "TCDScheduler"}.isdisjoint(CLASSES)
