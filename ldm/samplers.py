"""Solvers of the reverse process: small pure functions, each named after its paper.

A solver goes through noise `Levels` from the first to the last. It knows the network only as `denoise(x, level)`: x₀
for a noised x [B, ...], float32. The levels are those of diffusers' schedulers, so that a model gives the same images
there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from torch import Tensor

from ldm.diffusion import NUM_STEPS, Diffusion
from ldm.errors import ConfigError


@dataclass(frozen=True)
class Level:
    """A point of the process: x = α·x₀ + σ·ε."""

    time: float
    """What the U-Net is given; not used at the last level."""
    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """λ = log(α/σ), half the logarithm of the signal-to-noise ratio."""
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


@dataclass(frozen=True)
class Levels:
    """The levels of a run: one for each call of the network, and where it ends."""

    levels: tuple[Level, ...]
    noise_scale: float = 1.0
    """Standard deviation of the noise that the run starts from."""

    @property
    def steps(self) -> int:
        return len(self.levels) - 1


Denoise = Callable[[Tensor, Level], Tensor]
Solve = Callable[[Denoise, Tensor, Levels], Tensor]


@dataclass(frozen=True)
class Sampler:
    """A solver with the levels it is usually run on."""

    levels: Callable[[Diffusion, int], Levels]
    """(diffusion, steps) to levels."""
    solve: Solve
    """(denoise, standard normal noise [B, ...], levels) to x₀ [B, ...]."""


def get_sampler(name: str) -> Sampler:
    """The sampler of that name. Raises `ConfigError` if there is none."""
    if name not in SAMPLERS:
        raise ConfigError(f"sampler {name!r} is unknown: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


# -- solvers -----------------------------------------------------------------------------------------------------------


def ddim(denoise: Denoise, noise: Tensor, levels: Levels) -> Tensor:
    """Song et al. 2021, eq. 12 with η = 0: keep the noise that x implies, change its share.

    This is also Euler's method (ibid., eq. 14; Karras et al. 2022, algorithm 1 without churn) on x/α over σ/α, and on a
    flow along its velocity: `euler` differs from `ddim` in its levels alone.
    """
    x = noise * levels.noise_scale
    for now, then in pairwise(levels.levels):
        x0 = denoise(x, now)
        epsilon = (x - now.alpha * x0) / now.sigma
        x = then.alpha * x0 + then.sigma * epsilon
    return x


def dpmpp_2m(denoise: Denoise, noise: Tensor, levels: Levels) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: of second order by the last two x₀.

    The first step, and one to σ = 0, are of first order.
    """
    x = noise * levels.noise_scale
    before: tuple[Level, Tensor] | None = None
    for now, then in pairwise(levels.levels):
        x0 = denoise(x, now)
        h = then.log_snr - now.log_snr
        mixed = x0
        if before is not None and then.sigma > 0:
            r = (now.log_snr - before[0].log_snr) / h
            mixed = x0 + (x0 - before[1]) / (2 * r)
        x = then.sigma / now.sigma * x - then.alpha * math.expm1(-h) * mixed
        before = (now, x0)
    return x


# -- levels ------------------------------------------------------------------------------------------------------------


def ddim_levels(diffusion: Diffusion, steps: int) -> Levels:
    """Every (1000 // steps)-th step of the discrete process from step 1 on, ending at step 0's noise: "leading" spacing
    with an offset of 1, as Stable Diffusion's. A flow takes `euler_levels`.
    """
    if diffusion.config.is_flow:
        return euler_levels(diffusion, steps)
    _check_steps(steps)
    stride = NUM_STEPS // steps
    times = np.arange(steps)[::-1] * stride + 1
    alphas_squared = diffusion.alphas_cumprod.double().numpy()[[*times, 0]]
    return _levels(times, np.sqrt(alphas_squared), np.sqrt(1 - alphas_squared))


def euler_levels(diffusion: Diffusion, steps: int) -> Levels:
    """Evenly spaced times from the first to the last step, fractional, then no noise.

    On a flow: t from 1 to 1/1000, then 0.
    """
    _check_steps(steps)
    if diffusion.config.is_flow:
        return _flow_levels(np.linspace(1, 1 / NUM_STEPS, steps), whole_times=False)
    return _discrete_levels(diffusion, np.linspace(NUM_STEPS - 1, 0, steps), starts_scaled=True)


def dpmpp_levels(diffusion: Diffusion, steps: int) -> Levels:
    """Evenly spaced whole times from the last step down to, but without, the first; then no noise.

    On a flow: t from 0.999 down in even steps to 0; the U-Net is given 1000·t without its fraction.
    """
    _check_steps(steps)
    if diffusion.config.is_flow:
        t = (1.0 - np.linspace(1, 1 / NUM_STEPS, steps + 1))[::-1][:-1]
        return _flow_levels(t, whole_times=True)
    return _discrete_levels(diffusion, np.linspace(0, NUM_STEPS - 1, steps + 1).round()[::-1][:-1])


def _discrete_levels(diffusion: Diffusion, times: np.ndarray, *, starts_scaled: bool = False) -> Levels:
    """Levels at fractional `times`: σ/α is interpolated linearly. If `starts_scaled`, the noise at the start is σ/α's
    alone, without the unit of the data."""
    alphas_cumprod = diffusion.alphas_cumprod.numpy()
    ratios = np.interp(times, np.arange(NUM_STEPS), ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5)
    ratios = np.append(ratios, 0).astype(np.float32).astype(np.float64)
    alphas = 1 / np.sqrt(ratios**2 + 1)
    sigmas = ratios * alphas
    return _levels(times, alphas, sigmas, noise_scale=float(sigmas[0]) if starts_scaled else 1.0)


def _flow_levels(t: np.ndarray, *, whole_times: bool) -> Levels:
    times = t * NUM_STEPS
    # Rounded as diffusers does: 1 − σ of the first level is small, and its logarithm shows the difference.
    sigmas = np.append(t, 0).astype(np.float32).astype(np.float64)
    return _levels(times.astype(np.int64) if whole_times else times, 1 - sigmas, sigmas)


def _levels(times: np.ndarray, alphas: np.ndarray, sigmas: np.ndarray, noise_scale: float = 1.0) -> Levels:
    each = zip([*times, 0], alphas, sigmas, strict=True)
    return Levels(tuple(Level(float(time), float(a), float(s)) for time, a, s in each), noise_scale)


def _check_steps(steps: int) -> None:
    if not 1 <= steps < NUM_STEPS:
        raise ConfigError(f"steps = {steps}: must be from 1 to {NUM_STEPS - 1}")


SAMPLERS = {
    "ddim": Sampler(ddim_levels, ddim),
    "euler": Sampler(euler_levels, ddim),
    "dpmpp_2m": Sampler(dpmpp_levels, dpmpp_2m),
}
"""By the names that commands and recipes use."""
