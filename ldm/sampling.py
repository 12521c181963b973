"""From noise to latents: conditioning, guidance and a solver put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion import Diffusion, denoised
from ldm.errors import GenerationError
from ldm.guidance import guided
from ldm.samplers import Level, get_sampler
from ldm.unet import UNet2DCondition

Progress = Callable[[int, int], None]
"""Called with (calls of the network so far, calls in all)."""


@torch.no_grad()
def sample_latents(
    unet: UNet2DCondition,
    diffusion: Diffusion,
    conditioning: Conditioning,
    empty: Conditioning,
    noise_BCHW: Tensor,
    *,
    guidance_scale: float,
    sampler: str,
    steps: int,
    progress: Progress | None = None,
) -> Tensor:
    """Scaled latents float32 [B, C, h, w] from standard normal noise, on the U-Net's device.

    Raises `ConfigError` for an unknown sampler or an impossible number of steps, `GenerationError` if the result is not
    numbers.
    """
    method = get_sampler(sampler)
    levels = method.levels(diffusion, steps)
    device = unet.conv_in.weight.device
    conditioning, empty = conditioning.to(device), empty.to(device)
    done = 0

    def denoise(x: Tensor, level: Level) -> Tensor:
        nonlocal done
        times = torch.full((len(x),), level.time, device=device)
        output = guided(unet, x, times, conditioning, empty, guidance_scale)
        done += 1
        if progress is not None:
            progress(done, levels.steps)
        return denoised(diffusion.config.prediction, x, output, level.alpha, level.sigma)

    latents = method.solve(denoise, noise_BCHW.to(device, torch.float32), levels)
    if not bool(latents.isfinite().all()):
        raise GenerationError(f"{sampler} with {steps} steps gave latents that are not numbers: check the weights")
    return latents


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise float32 [len(seeds), *shape] on the CPU: the first that a generator of each seed draws."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
