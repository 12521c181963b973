"""diffusers' schedulers whose scheduler_config.json is understood, and what each of their keys may be.

A key has the class's default where the file leaves it out, and only values for which the computation is the one done
here. Keys that the class doesn't take are without effect, as in diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldm.config import is_of, kind_name
from ldm.errors import ConfigError


@dataclass(frozen=True)
class Key:
    """A key of one class."""

    default: Any
    values: tuple[Any, ...] | None = None
    """Values that are supported. None: all of the type."""
    kind: Any = None
    """The annotation that a value has to fit, None: the default's type."""

    def check(self, name: str, values: Mapping[str, Any], owner: str) -> Any:
        """The value, or the default if there is none. Raises `ConfigError` for one that is not supported."""
        value = values.get(name, self.default)
        source = "" if name in values else f", as {owner} has it where the file has none"
        kind = type(self.default) if self.kind is None else self.kind
        if self.values is not None and not any(_same(value, each) for each in self.values):
            raise ConfigError(f"{name} = {value!r}{source}: only {_listed(self.values)} is supported with {owner}")
        if self.values is None and not is_of(value, kind):
            raise ConfigError(f"{name} = {value!r}{source}: must be of type {kind_name(kind)}")
        return value


def only(value: Any) -> Key:
    """A key with one value, which is the default."""
    return Key(value, (value,))


ANY_FLAG = Key(False, (False, True))
NEVER = only(False)
STEPS = {"num_train_timesteps": only(1000)}
BETAS = STEPS | {
    "beta_start": Key(1e-4, kind=float),
    "beta_end": Key(0.02, kind=float),
    "beta_schedule": Key("linear", ("linear", "scaled_linear", "squaredcos_cap_v2")),
    "trained_betas": only(None),
}
ZERO_SNR = {"rescale_betas_zero_snr": ANY_FLAG}
OFFSET = {"steps_offset": Key(0, (0, 1))}
SPACED = OFFSET | {"timestep_spacing": Key("linspace", ("linspace", "leading", "trailing"))}
LED = OFFSET | {"timestep_spacing": Key("leading", ("leading", "trailing"))}
"""Where diffusers' `linspace` steps to other levels than those that it goes on from."""
LIMITS = {"sigma_min": Key(None, kind=float | None), "sigma_max": Key(None, kind=float | None)}
"""diffusers reads them from the file for `karras` even where the class doesn't name them."""
KARRAS = {"use_karras_sigmas": ANY_FLAG, "use_exponential_sigmas": NEVER, "use_beta_sigmas": NEVER} | LIMITS
THRESHOLD = {"thresholding": NEVER}
CLIP = {"clip_sample": Key(True, (False,))}
FLOW = {"use_flow_sigmas": ANY_FLAG, "flow_shift": Key(1.0, kind=float), "use_dynamic_shifting": NEVER}
ENDS = {"final_sigmas_type": only("zero")}
EDM = (
    STEPS
    | ENDS
    | {name: Key(value, kind=float) for name, value in (("sigma_min", 0.002), ("sigma_max", 80.0))}
    | {name: Key(value, kind=float) for name, value in (("sigma_data", 0.5), ("rho", 7.0))}
    | {"sigma_schedule": only("karras")}
)
MULTISTEP = (
    THRESHOLD
    | ENDS
    | {
        "solver_order": Key(2, (2, 1)),
        "algorithm_type": Key("dpmsolver++", ("dpmsolver++", "sde-dpmsolver++")),
        # diffusers takes other solvers' names for its own.
        "solver_type": Key("midpoint", ("midpoint", "logrho", "bh1", "bh2")),
        # Without effect where the last step goes to no noise, which is of first order anyway.
        "lower_order_final": Key(True, (True, False)),
        "euler_at_final": ANY_FLAG,
    }
)


def predictions(*names: str) -> dict[str, Key]:
    """What the network may predict; the first by default."""
    return {"prediction_type": Key(names[0], names)}


CLASSES: dict[str, Mapping[str, Key]] = {
    "DDPMScheduler": BETAS
    | ZERO_SNR
    | SPACED
    | CLIP
    | THRESHOLD
    | predictions("epsilon", "sample", "v_prediction")
    | {"timestep_spacing": Key("leading", ("leading", "trailing", "linspace")), "variance_type": only("fixed_small")},
    "DDIMScheduler": BETAS
    | ZERO_SNR
    | LED
    | CLIP
    | THRESHOLD
    | predictions("epsilon", "sample", "v_prediction")
    | {"set_alpha_to_one": Key(True, (True, False))},
    "PNDMScheduler": BETAS
    | LED
    | predictions("epsilon", "v_prediction")
    | {"set_alpha_to_one": ANY_FLAG, "skip_prk_steps": Key(False, (True,))},
    "EulerDiscreteScheduler": BETAS
    | ZERO_SNR
    | SPACED
    | KARRAS
    | ENDS
    | predictions("epsilon", "sample", "v_prediction")
    | {"interpolation_type": only("linear"), "timestep_type": only("discrete")},
    "EulerAncestralDiscreteScheduler": BETAS | ZERO_SNR | SPACED | predictions("epsilon", "v_prediction"),
    "HeunDiscreteScheduler": BETAS
    | SPACED
    | KARRAS
    | predictions("epsilon", "sample", "v_prediction")
    | {
        "beta_start": Key(0.00085, kind=float),
        "beta_end": Key(0.012, kind=float),
        "clip_sample": NEVER,
    },
    "DPMSolverMultistepScheduler": BETAS
    | ZERO_SNR
    | SPACED
    | KARRAS
    | FLOW
    | MULTISTEP
    | predictions("epsilon", "sample", "v_prediction", "flow_prediction")
    | {"use_lu_lambdas": NEVER, "lambda_min_clipped": only(-math.inf), "variance_type": only(None)},
    "UniPCMultistepScheduler": BETAS
    | ZERO_SNR
    | SPACED
    | KARRAS
    | FLOW
    | THRESHOLD
    | ENDS
    | predictions("epsilon", "sample", "v_prediction", "flow_prediction")
    | {
        "solver_order": Key(2, (2, 1)),
        "solver_type": Key("bh2", ("bh2", "midpoint", "heun", "logrho")),
        "lower_order_final": only(True),
        "predict_x0": only(True),
        "disable_corrector": only([]),
        "solver_p": only(None),
        "shift_terminal": only(None),
    },
    "FlowMatchEulerDiscreteScheduler": STEPS
    | {"shift": Key(1.0, kind=float), "use_dynamic_shifting": NEVER, "shift_terminal": only(None)}
    | {"use_karras_sigmas": NEVER, "use_exponential_sigmas": NEVER, "use_beta_sigmas": NEVER}
    | {
        "invert_sigmas": NEVER,
        "stochastic_sampling": NEVER,
        "time_shift_type": Key("exponential", ("exponential", "linear")),
    },
    "FlowMatchHeunDiscreteScheduler": STEPS | {"shift": Key(1.0, kind=float)},
    "EDMEulerScheduler": EDM | predictions("epsilon"),
    "EDMDPMSolverMultistepScheduler": EDM | MULTISTEP | predictions("epsilon"),
}
"""The keys that each scheduler class has, by `_class_name`."""

WITHOUT_EFFECT = {
    *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value"),  # where nothing is clipped
    *("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type"),  # where none is dynamic
    *("original_inference_steps", "timestep_scaling", "tau_func", "predictor_order", "corrector_order"),
    *("scale_factors", "upscale_mode", "noise_sampler_seed"),  # these and the line above: of other classes
    *(key for keys in CLASSES.values() for key in keys),
}
"""Keys that change nothing for a class that has no rule for them."""

OVERWRITTEN: dict[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionImg2ImgPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}
"""What stock pipelines take, whatever the file has."""


def checked(
    scheduler: Mapping[str, Any], class_name: str | None, overwritten: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """The class of a scheduler_config.json, and the values of all its keys; `overwritten` take the place of the file's.

    Raises `ConfigError` for a class that is not known here, naming those that are, for values that are not supported,
    and for keys that no class has, unless they are null.
    """
    name = scheduler.get("_class_name") if class_name is None else class_name
    if not isinstance(name, str) or name not in CLASSES:
        raise ConfigError(f"_class_name = {name!r}: only {', '.join(CLASSES)} are supported")
    keys = CLASSES[name]
    said = scheduler.get("_use_default_values")
    defaults = said if isinstance(said, list) else []
    given = {key: value for key, value in scheduler.items() if key not in defaults and not key.startswith("_")}
    known = keys.keys() | WITHOUT_EFFECT
    unknown = [key for key, value in given.items() if key not in known and value is not None]
    if unknown:
        raise ConfigError(f"{unknown[0]} = {given[unknown[0]]!r} is not a key of {name} that is understood here")
    given |= overwritten
    return name, {key: rule.check(key, given, name) for key, rule in keys.items()}


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _listed(values: tuple[Any, ...]) -> str:
    return " or ".join(repr(value) for value in values)
