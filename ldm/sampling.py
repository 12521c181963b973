"""From noise to latents: conditioning, guidance and a solver put together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.diffusion import Diffusion
from ldm.errors import ConfigError, GenerationError, InputError
from ldm.guidance import Extra, Guidance, Guided
from ldm.samplers import (
    After,
    Draw,
    Level,
    Levels,
    SamplerOptions,
    Spacing,
    dynamic_threshold,
    get_sampler,
    unchanged,
)

Progress = Callable[[int, int], None]
"""Called with (calls of the network so far, calls in all)."""


@torch.no_grad()
def sample_latents(
    unet: nn.Module,
    diffusion: Diffusion,
    conditioning: Conditioning | Sequence[Conditioning],
    empty: Conditioning | None,
    noise_BCHW: Tensor,
    *,
    guidance: Guidance | float,
    sampler: str,
    steps: int,
    spacing: Spacing | None = None,
    eta: float | None = None,
    sampler_options: SamplerOptions | None = None,
    x0_BCHW: Tensor | None = None,
    strength: float = 1.0,
    begin: float = 0.0,
    end: float = 1.0,
    extra_channels_BCHW: Extra = None,
    after: After = unchanged,
    generators: Sequence[torch.Generator] | None = None,
    threshold: tuple[float, float] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Scaled latents float32 [B, C, h, w] from standard normal noise, on the U-Net's device.

    - `conditioning`, `empty`, `guidance`: see `ldm.guidance.Guided`; several conditions each have a scale.
    - `sampler`, `steps`, `spacing`, `eta`, `sampler_options`: see `ldm.samplers`; None is the sampler's own.
    - `x0_BCHW`, `strength`: image-to-image; scaled latents, of which the last `strength` of the steps are made anew.
    - `begin`, `end`: the part of the process to run, 0 to 1. With an `end` below 1 the result is still noised; another
      network goes on with it as `noise_BCHW` and that `begin` (Podell et al. 2023, section 2.5: 0.8).
    - `extra_channels_BCHW`: go with the latents into the network, as for inpainting and upscaling.
    - `after`: changes x after each step; see `ldm.samplers.solvers`.
    - `generators`: one on the CPU for each image, of which stochastic samplers draw. None: begun from the image's own
      noise. Either way no image depends on its batch.
    - `threshold`: percentile and limit of `dynamic_threshold`, each time for x₀.

    Raises `ConfigError` for an unknown sampler or spacing, an impossible number of steps, or what can't be had
    together; `InputError` for latents that don't fit or aren't numbers; `GenerationError` if the result is not numbers.
    """
    method = get_sampler(sampler, eta, sampler_options)
    levels = method.levels_of(diffusion, steps, spacing, noise_BCHW.shape[-2] * noise_BCHW.shape[-1])
    levels = _part(levels.from_strength(strength) if x0_BCHW is not None else levels, begin, end)
    _check_inputs(noise_BCHW, x0_BCHW, strength, begin, generators, threshold)
    device = next((weight.device for weight in unet.parameters()), noise_BCHW.device)
    conditions = [conditioning] if isinstance(conditioning, Conditioning) else conditioning
    conditions = [condition.to(device) for condition in conditions]
    empty = None if empty is None else empty.to(device)
    network = Guided(unet, conditions, empty, guidance, extra_BEHW=_extra_to(extra_channels_BCHW, device))
    calls, done = method.calls(levels), 0

    def denoise(x: Tensor, level: Level) -> Tensor:
        nonlocal done
        times = torch.full((len(x),), level.time, device=device)
        inputs = diffusion.scale_input(x, level.sigma)
        output = network(inputs, times, noise_share=level.noise_share)
        done += 1
        if progress is not None:
            progress(done, calls)
        x0 = diffusion.denoised(x, output, level.alpha, level.sigma)
        return x0 if threshold is None else dynamic_threshold(x0, *threshold)

    noise = noise_BCHW.to(device, torch.float32)
    if x0_BCHW is not None:
        x = levels.start_from(x0_BCHW.to(device, torch.float32), noise)
    else:
        x = levels.start(noise) if begin == 0 else noise
    draw = draw_of(_generators_of(noise_BCHW) if generators is None else generators, x)
    latents = method.solve(denoise, x, levels, draw, after)
    if not bool(latents.isfinite().all()):
        raise GenerationError(f"{sampler} with {steps} steps gave latents that are not numbers: check the weights")
    return latents


def seeded_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise float32 [len(seeds), *shape] on the CPU: the first that a generator of each seed draws."""
    return seeded_start(seeds, shape)[0]


def seeded_start(seeds: Sequence[int], shape: tuple[int, ...]) -> tuple[Tensor, list[torch.Generator]]:
    """`seeded_noise` and the generators that drew it, for the noise that a sampler adds on its way."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]), generators


def draw_of(generators: Sequence[torch.Generator], like_BCHW: Tensor) -> Draw:
    """Draws noise like x, each row from its own generator on the CPU."""

    def draw() -> Tensor:
        rows = [torch.randn(like_BCHW.shape[1:], generator=generator) for generator in generators]
        return torch.stack(rows).to(like_BCHW)

    return draw


def _generators_of(noise_BCHW: Tensor) -> list[torch.Generator]:
    """One for each image, begun from the bytes of its noise."""
    digests = [hashlib.sha256(row.numpy().tobytes()).digest() for row in noise_BCHW.detach().float().cpu()]
    return [torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True)) for digest in digests]


def _part(levels: Levels, begin: float, end: float) -> Levels:
    if not 0 <= begin < end <= 1:
        raise ConfigError(f"begin = {begin}, end = {end}: must be 0 <= begin < end <= 1")
    if end < 1:
        levels = levels.split(end)[0]
    return levels.split(begin)[1] if begin > 0 else levels


def _check_inputs(
    noise: Tensor,
    x0: Tensor | None,
    strength: float,
    begin: float,
    generators: Sequence[torch.Generator] | None,
    threshold: tuple[float, float] | None,
) -> None:
    if x0 is None and strength != 1:
        raise ConfigError(f"strength = {strength} without x0: give the latents to begin from, or leave it out")
    if x0 is not None and begin > 0:
        raise ConfigError(f"begin = {begin} with x0: noise is taken for noised latents there, leave x0 out")
    if x0 is not None and x0.shape != noise.shape:
        raise InputError(f"x0 is {tuple(x0.shape)}, noise {tuple(noise.shape)}: must be equal")
    for name, latents in (("noise", noise), ("x0", x0)):
        if latents is not None and not bool(latents.isfinite().all()):
            raise InputError(f"{name} has values that are not numbers")
    if generators is not None and len(generators) != len(noise):
        raise InputError(f"{len(generators)} generators and {len(noise)} images: give one for each")
    if threshold is not None and not (0 < threshold[0] <= 1 and threshold[1] > 0):
        raise ConfigError(f"threshold = {threshold}: must be a percentile in (0, 1] and a limit above 0")


def _extra_to(extra: Extra, device: torch.device) -> Extra:
    if extra is None or isinstance(extra, Tensor):
        return None if extra is None else extra.to(device, torch.float32)
    return [part.to(device, torch.float32) for part in extra]
