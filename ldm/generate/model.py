"""From prompts to images: conditioning, guidance, sampler and decoder put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.autoencoder import AutoencoderKL
from ldm.conditioning import TextEncoder
from ldm.diffusion import Diffusion
from ldm.errors import InputError
from ldm.latents import pixels_to_uint8, unscale_latents
from ldm.sampling import Progress, sample_latents, seeded_noise
from ldm.unet import UNet2DCondition


@dataclass
class LatentDiffusion:
    """A text-to-image model, whole. The parts lie on one device; networks may be of any floating dtype."""

    unet: UNet2DCondition
    autoencoder: AutoencoderKL
    text_encoder: TextEncoder
    diffusion: Diffusion

    @property
    def device(self) -> torch.device:
        """Where the U-Net's weights are."""
        return self.unet.conv_in.weight.device


def text_to_image(
    model: LatentDiffusion,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int] | None = None,
    guidance_scale: float = 3.0,
    sampler: str = "dpmpp_2m",
    steps: int = 20,
    size: tuple[int, int] | None = None,
    noise: Tensor | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Tensor:
    """Uint8 images [len(prompts), H, W, 3] on the CPU.

    Each image's noise comes from its own seed, so that it doesn't depend on the batch that it is made in. `noise`
    [len(prompts), C, h, w] takes the place of `seeds`; one of them is needed. `size` is (height, width) in pixels,
    the model's own if None. `guidance_scale` 1 is without guidance, and half the work.

    Raises `InputError` for prompts, seeds, noise or sizes that don't fit, `ConfigError` for an unknown sampler or an
    impossible number of steps, `GenerationError` if the result is not numbers.
    """
    prompts = list(prompts)
    noise = _noise(model, len(prompts), seeds, size) if noise is None else noise
    _check_noise(model, noise, len(prompts), size)
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size}: must be 1 or more")
    empty = model.text_encoder.null(1)
    starts = range(0, len(prompts), batch_size)
    images = []
    for index, start in enumerate(starts):
        conditioning = model.text_encoder.encode(prompts[start : start + batch_size])
        latents = sample_latents(
            model.unet,
            model.diffusion,
            conditioning,
            empty.expand(len(conditioning)),
            noise[start : start + batch_size],
            guidance_scale=guidance_scale,
            sampler=sampler,
            steps=steps,
            progress=_part(progress, index, len(starts)),
        )
        images.append(decode_latents(model.autoencoder, latents))
    return torch.cat(images)


@torch.no_grad()
def decode_latents(autoencoder: AutoencoderKL, scaled_BCHW: Tensor) -> Tensor:
    """Uint8 images [B, H, W, 3] on the CPU, of scaled latents."""
    return pixels_to_uint8(autoencoder.decode(unscale_latents(scaled_BCHW, autoencoder.config))).cpu()


def _noise(model: LatentDiffusion, count: int, seeds: Sequence[int] | None, size: tuple[int, int] | None) -> Tensor:
    if seeds is None:
        raise InputError("neither seeds nor noise: give one seed a prompt")
    if len(seeds) != count or count == 0:
        raise InputError(f"{count} prompts and {len(seeds)} seeds: give at least one prompt, and one seed for each")
    channels, factor = model.autoencoder.config.latent_channels, model.autoencoder.config.downsampling
    height, width = size or (model.unet.config.sample_size * factor,) * 2
    if height < factor or width < factor or height % factor or width % factor:
        raise InputError(f"size = {height}x{width} pixels: sides must be multiples of {factor}")
    return seeded_noise(seeds, (channels, height // factor, width // factor))


def _check_noise(model: LatentDiffusion, noise: Tensor, count: int, size: tuple[int, int] | None) -> None:
    channels, factor = model.autoencoder.config.latent_channels, model.autoencoder.config.downsampling
    if noise.ndim != 4 or noise.shape[:2] != (count, channels):
        raise InputError(f"noise is {tuple(noise.shape)}: must be [{count}, {channels}, height, width]")
    if size is not None and tuple(noise.shape[2:]) != (size[0] // factor, size[1] // factor):
        raise InputError(f"noise is {tuple(noise.shape)}, size {size}: leave size out, the noise has it")
    if not bool(noise.isfinite().all()):
        raise InputError("noise has values that are not numbers")


def _part(progress: Progress | None, index: int, parts: int) -> Progress | None:
    """Progress of one part of several equal ones, as progress of the whole."""
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, parts * total)
