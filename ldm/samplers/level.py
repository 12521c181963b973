"""Noise levels that a solver goes through."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from ldm.errors import ConfigError


@dataclass(frozen=True)
class Level:
    """A point of the process: x = α·x₀ + σ·ε."""

    time: float
    """What the U-Net is given; not used at the last level."""
    alpha: float
    sigma: float
    progress: float = 0.0
    """How much of the process lies behind, from 0 (noise) to 1 (data): 1 − time/1000; of EDM, the share of steps."""

    @property
    def log_snr(self) -> float:
        """λ = log(α/σ), half the logarithm of the signal-to-noise ratio."""
        if self.sigma == 0:
            return math.inf
        return -math.inf if self.alpha == 0 else math.log(self.alpha / self.sigma)

    @property
    def noise_share(self) -> float:
        """σ/(α + σ), from 0 (data) to 1 (noise): the time of a flow with this signal-to-noise ratio."""
        return self.sigma / (self.alpha + self.sigma)


@dataclass(frozen=True)
class Levels:
    """The levels of a run: one for each step, and where it ends."""

    levels: tuple[Level, ...]
    noise_scale: float = 1.0
    """Standard deviation of the noise that the run starts from."""
    straight: bool = False
    """Whether they lie on a flow's straight paths."""

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def start(self, noise: Tensor) -> Tensor:
        """x at the first level, of standard normal noise."""
        return noise * self.noise_scale

    def start_from(self, x0: Tensor, noise: Tensor) -> Tensor:
        """x at the first level, of data and standard normal noise."""
        return self.levels[0].alpha * x0 + self.levels[0].sigma * noise

    def from_strength(self, strength: float) -> Levels:
        """The last `strength` of the steps, for image-to-image (Meng et al. 2022, section 3); 1 is all of them.

        Raises `ConfigError` unless that is in (0, 1] and leaves a step.
        """
        if not 0 < strength <= 1:
            raise ConfigError(f"strength = {strength}: must be above 0 (as the image is) and up to 1 (anew)")
        kept = int(self.steps * strength)  # as diffusers: of 50 steps, 0.58 are 28
        if kept == 0:
            raise ConfigError(f"strength = {strength} of {self.steps} steps leaves none: take more of either")
        return replace(self, levels=self.levels[self.steps - kept :])

    def split(self, fraction: float) -> tuple[Levels, Levels]:
        """The levels until and from the first that has more than `fraction` of the process behind it, which is in both:
        for a network and its refiner (Podell et al. 2023, section 2.5).

        Raises `ConfigError` unless both have a step.
        """
        until = sum(level.progress <= fraction + 1e-6 for level in self.levels[:-1])
        if not 0 < until < self.steps:
            raise ConfigError(f"split at {fraction}: leaves a part of {self.steps} steps with none, choose another")
        return replace(self, levels=self.levels[: until + 1]), replace(self, levels=self.levels[until:])
