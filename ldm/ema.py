"""Exponential moving average of weights, for networks that one process holds whole.

Sharded training averages its own shards, with the same `decay_at`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError, InputError


def decay_at(step: int, decay: float) -> float:
    """Decay at update `step`, counted from 0: min(decay, (1 + step) / (10 + step)).

    The warm-up forgets the initial weights quickly. Raises `ConfigError` unless 0 <= decay < 1.
    """
    if not 0 <= decay < 1:
        raise ConfigError(f"ema_decay = {decay}: must be from 0 to below 1")
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """Float32 averages of named parameters, whatever precision those have."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], decay: float) -> None:
        """`parameters` as `module.named_parameters()` gives them; the averages start at their values.

        Raises `ConfigError` unless 0 <= decay < 1.
        """
        decay_at(0, decay)
        self.decay = decay
        self.step = 0
        self.averages = {name: value.detach().float().clone() for name, value in parameters}

    @torch.no_grad()
    def update(self, parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Move the averages towards the parameters by 1 − `decay_at(step)`. The names must be those of the start."""
        weight = 1 - decay_at(self.step, self.decay)
        for name, value in parameters:
            self.averages[name].lerp_(value.detach().float(), weight)
        self.step += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrite the module's parameters with their averages.

        Raises `InputError` if a parameter has none.
        """
        for name, parameter in module.named_parameters():
            if name not in self.averages:
                raise InputError(f"parameter {name} has no average: the EMA was made for another network")
            parameter.copy_(self.averages[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, and the number of updates under the key `step`."""
        return {"step": torch.tensor(self.step)} | self.averages

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from another's `state_dict`. Raises `InputError` if the names differ."""
        names = set(state) - {"step"}
        if names != set(self.averages):
            raise InputError(f"EMA state has other parameters: {', '.join(sorted(names ^ set(self.averages))[:5])}")
        self.step = int(state["step"])
        for name, average in self.averages.items():
            average.copy_(state[name])
