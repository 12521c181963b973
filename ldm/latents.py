"""Pixels, posterior moments and latents, one into another: the only place where a scale factor is applied.

uint8 ⇄ pixels in [-1, 1] ─encode▶ moments ─draw▶ latents ⇄ scaled latents (what the diffusion sees)
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ldm.errors import InputError

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class LatentScale(Protocol):
    """What an autoencoder's configuration says of its latents' distribution."""

    @property
    def scaling_factor(self) -> float: ...
    @property
    def shift_factor(self) -> float | None: ...
    @property
    def latents_mean(self) -> tuple[float, ...] | None: ...
    @property
    def latents_std(self) -> tuple[float, ...] | None: ...


def split_moments(moments_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the posterior, [B, C, h, w] each; the log-variance clamped to [-30, 20].

    Raises `InputError` if the number of channels is odd.
    """
    if moments_BCHW.shape[1] % 2:
        raise InputError(f"moments are {tuple(moments_BCHW.shape)}: channels must be means, then as many log-variances")
    mean, log_variance = moments_BCHW.chunk(2, dim=1)
    return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)


def posterior_mean(moments_BCHW: Tensor) -> Tensor:
    """The posterior's mean [B, C, h, w]: the latents without a draw, unscaled."""
    return split_moments(moments_BCHW)[0]


def sample_posterior(moments_BCHW: Tensor, noise_BCHW: Tensor) -> Tensor:
    """Latents drawn from the posterior with standard normal noise [B, C, h, w] (Kingma & Welling 2014), unscaled.

    Raises `InputError` if the noise doesn't have the shape of the mean.
    """
    mean, log_variance = split_moments(moments_BCHW)
    if noise_BCHW.shape != mean.shape:
        raise InputError(f"noise is {tuple(noise_BCHW.shape)}: must have the mean's shape {tuple(mean.shape)}")
    return mean + (0.5 * log_variance).exp() * noise_BCHW


def scale_latents(latents_BCHW: Tensor, config: LatentScale) -> Tensor:
    """What the diffusion sees: (latents − shift) · scale (Rombach et al. 2022, appendix G), of each channel its own
    where the configuration has means and standard deviations.

    Raises `InputError` if those are of another number of channels.
    """
    shift, scale = _shift_and_scale(latents_BCHW, config)
    return (latents_BCHW - shift) * scale


def unscale_latents(scaled_BCHW: Tensor, config: LatentScale) -> Tensor:
    """The inverse of `scale_latents`: what the decoder takes. Raises `InputError` alike."""
    shift, scale = _shift_and_scale(scaled_BCHW, config)
    return scaled_BCHW / scale + shift


def _shift_and_scale(latents_BCHW: Tensor, config: LatentScale) -> tuple[Tensor | float, Tensor | float]:
    shift, scale = config.shift_factor or 0.0, config.scaling_factor
    if config.latents_mean is None or config.latents_std is None:
        return shift, scale
    channels = len(config.latents_mean)
    if latents_BCHW.ndim != 4 or latents_BCHW.shape[1] != channels:
        raise InputError(f"latents are {tuple(latents_BCHW.shape)}: must be [batch, {channels}, height, width]")
    mean, std = (latents_BCHW.new_tensor(values)[:, None, None] for values in (config.latents_mean, config.latents_std))
    return mean + shift, scale / std


def pixels_from_uint8(images: Tensor) -> Tensor:
    """Float32 pixels in [-1, 1], [B, 3, H, W] in channels_last memory, of uint8 [B, H, W, 3] or [B, 3, H, W].

    Raises `InputError` for another type or shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise InputError(f"images are {images.dtype} {tuple(images.shape)}: must be uint8 [batch, height, width, 3]")
    if images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    elif images.shape[1] != 3:
        raise InputError(f"images are {tuple(images.shape)}: must have 3 channels, last or second")
    return images.float().div_(127.5).sub_(1.0).contiguous(memory_format=torch.channels_last)


def pixels_to_uint8(pixels_BCHW: Tensor) -> Tensor:
    """Uint8 [B, H, W, C] of pixels in [-1, 1]; values beyond are clipped."""
    unit = (pixels_BCHW.float() / 2 + 0.5).clamp(0, 1)
    return (unit * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
