"""The course that a scheduler of diffusers and a sampler here take through the same network."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from ldm.diffusion import Diffusion
from ldm.samplers import Level, Sampler, Spacing
from ldm.samplers.solvers import unchanged

STOCHASTIC = (diffusers.DDPMScheduler, diffusers.EulerAncestralDiscreteScheduler)


def network(x: Tensor, time: float) -> Tensor:
    """A smooth function of input and time that mixes pixels and channels, in the place of the U-Net."""
    return torch.tanh(0.7 * x + time / 1000) + 0.3 * x.roll(1, -1) - 0.2 * x.flip(1)


def their_latents(scheduler: Any, noise: Tensor, steps: int) -> Tensor:
    """What a stock pipeline makes of the noise, as it calls the scheduler."""
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # or it takes the first of two equal times for the second, and runs out of them
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    sde = str(scheduler.config.get("algorithm_type", "")).startswith("sde")
    drawn = {"generator": torch.Generator().manual_seed(7)} if sde or isinstance(scheduler, STOCHASTIC) else {}
    for time in scheduler.timesteps:
        inputs = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(inputs, float(time)), time, x, return_dict=False, **drawn)[0]
    return x


def our_latents(method: Sampler, diffusion: Diffusion, noise: Tensor, steps: int, spacing: Spacing | None) -> Tensor:
    """What `ldm.sampling` makes of it; noise is drawn as there."""
    levels = method.levels_of(diffusion, steps, spacing, None)
    generator = torch.Generator().manual_seed(7)

    def denoise(x: Tensor, level: Level) -> Tensor:
        inputs = diffusion.scale_input(x, level.sigma)
        return diffusion.denoised(x, network(inputs, level.time), level.alpha, level.sigma)

    def draw() -> Tensor:
        return torch.randn(noise.shape, generator=generator)

    return method.solve(denoise, levels.start(noise), levels, draw, unchanged)
