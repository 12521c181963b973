"""Exponential moving averages of weights, for networks that one process holds whole.

Several horizons can be kept at once, to choose among after training. Sharded training averages its own shards, with
the same `decay_at`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ldm.errors import ConfigError, InputError

LARGEST_SIGMA_REL = 1 / math.sqrt(12)
"""Relative width (σ_rel) of a uniform average of the whole training, the flattest power profile."""


def decay_at(step: int, decay: float) -> float:
    """Decay at update `step`, counted from 0: min(decay, (1 + step) / (10 + step)).

    The warm-up forgets the initial weights quickly. Raises `ConfigError` unless 0 <= decay < 1.
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"ema_decay = {decay}: must be from 0 to below 1")
    return min(decay, (1 + step) / (10 + step))


class Profile(Protocol):
    """How much of an average an update keeps."""

    def decay_at(self, step: int) -> float:
        """The decay at update `step`, counted from 0: from 0 to below 1."""


@dataclass(frozen=True)
class Constant:
    """A constant decay after the warm-up of `decay_at`: a horizon of about 1 / (1 − decay) updates."""

    decay: float

    def __post_init__(self) -> None:
        decay_at(0, self.decay)

    def decay_at(self, step: int) -> float:
        return decay_at(step, self.decay)


@dataclass(frozen=True)
class Power:
    """A horizon that grows with training (Karras et al. 2024, section 3.1): update t has weight ∝ t^γ in the average.

    `sigma_rel` is the profile's standard deviation relative to the length of training, 0.05 to 0.15 in the paper.
    The initial weights are forgotten at the first update.
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma_rel <= LARGEST_SIGMA_REL:
            raise ConfigError(f"sigma_rel = {self.sigma_rel}: must be above 0, and at most {LARGEST_SIGMA_REL:.4f}")

    @property
    def exponent(self) -> float:
        """γ: the root, 0 or more, of σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)) (the paper's algorithm 2)."""
        inverse = self.sigma_rel**-2
        return max(float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max()), 0.0)

    def decay_at(self, step: int) -> float:
        return float((1 - 1 / (step + 1)) ** (self.exponent + 1))


class Ema:
    """Float32 averages of named parameters, whatever precision those have."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], decay: float | Profile) -> None:
        """`parameters` as `module.named_parameters()` gives them; the averages start at their values.

        A number stands for `Constant`. Raises `ConfigError` unless 0 <= decay < 1.
        """
        self.profile = Constant(decay) if isinstance(decay, int | float) else decay
        self.step = 0
        self.averages = {name: value.detach().float().clone() for name, value in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Move the averages towards the parameters by 1 − `decay_at(step)`, all in one call.

        Raises `InputError`, and moves none, unless names and shapes are those of the start.
        """
        values = self._matched(parameters, "EMA update")
        averages = [self.averages[name] for name in values]
        weight = 1 - self.profile.decay_at(self.step)
        if averages:
            torch._foreach_lerp_(averages, _in_float32(list(values.values())), weight)
        self.step += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with their averages.

        Raises `InputError`, and overwrites none, if a parameter has no average of its shape.
        """
        parameters = dict(module.named_parameters())
        for name, parameter in parameters.items():
            self._check(name, parameter, "network")
        for name, parameter in parameters.items():
            parameter.copy_(self.averages[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, and the number of updates under the key `step`."""
        return {"step": torch.tensor(self.step)} | self.averages

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from another's `state_dict`. Raises `InputError`, and changes nothing, if names or shapes differ."""
        if "step" not in state:
            raise InputError("EMA state has no step: give what state_dict returned")
        values = self._matched(((name, value) for name, value in state.items() if name != "step"), "EMA state")
        for name, value in values.items():
            self.averages[name].copy_(value)
        self.step = int(state["step"])

    def _matched(self, values: Iterable[tuple[str, Tensor]], where: str) -> dict[str, Tensor]:
        """A tensor for each average, of its shape. Raises `InputError` if there are others, or some are missing."""
        found = {name: value.detach() for name, value in values}
        other = sorted(found.keys() ^ self.averages.keys())
        if other:
            raise InputError(f"{where} has other parameters: {', '.join(other[:5])}")
        for name, value in found.items():
            self._check(name, value, where)
        return found

    def _check(self, name: str, value: Tensor, where: str) -> None:
        if name not in self.averages:
            raise InputError(f"parameter {name} has no average: the EMA was made for another network")
        if value.shape != self.averages[name].shape:
            shapes = f"{tuple(value.shape)} in the {where}, {tuple(self.averages[name].shape)} in the averages"
            raise InputError(f"parameter {name} is {shapes}: the EMA was made for another network")


def _in_float32(values: list[Tensor]) -> list[Tensor]:
    if all(value.dtype == torch.float32 for value in values):
        return values
    wider = [torch.empty_like(value, dtype=torch.float32) for value in values]
    torch._foreach_copy_(wider, values)
    return wider


class EmaHorizons:
    """Averages of the same parameters under several profiles, each by its name: {"short": Constant(0.999), ...}."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], profiles: Mapping[str, Profile]) -> None:
        """Raises `ConfigError` if there are no profiles, or a name has a slash, which separates it in the state."""
        if not profiles or any("/" in name for name in profiles):
            raise ConfigError(f"EMA profiles {list(profiles)}: give at least one, and names without a slash")
        parameters = list(parameters)
        self.horizons = {name: Ema(parameters, profile) for name, profile in profiles.items()}

    def update(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Update each average. The names must be those of the start."""
        parameters = list(parameters)
        for ema in self.horizons.values():
            ema.update(parameters)

    def copy_to(self, module: nn.Module, which: str) -> None:
        """Overwrite the module's parameters with their averages under the profile `which`.

        Raises `InputError` if there is no such profile, or a parameter has no average.
        """
        if which not in self.horizons:
            raise InputError(f"EMA profile {which!r}: must be one of {', '.join(self.horizons)}")
        self.horizons[which].copy_to(module)

    def state_dict(self) -> dict[str, Tensor]:
        """Every profile's state, its keys after the profile's name and a slash."""
        return {
            f"{name}/{key}": value for name, ema in self.horizons.items() for key, value in ema.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from another's `state_dict`. Raises `InputError` if profiles or parameters differ."""
        names = {key.partition("/")[0] for key in state}
        if names != set(self.horizons):
            raise InputError(f"EMA state has profiles {sorted(names)}: must be {sorted(self.horizons)}")
        for name, ema in self.horizons.items():
            prefix = f"{name}/"
            ema.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
