"""Classifier-free guidance (Ho & Salimans 2022): away from the empty prompt, towards the prompt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.errors import ConfigError


def guided(
    unet: nn.Module,
    latents_BCHW: Tensor,
    timesteps_B: Tensor,
    conditioning: Conditioning,
    empty: Conditioning,
    scale: float,
) -> Tensor:
    """The guided prediction u + scale·(c − u) [B, C, H, W] (ibid., eq. 6 with scale = 1 + w), from one pass over twice
    the batch; `empty` and `conditioning` have B rows each.

    A scale of 1 is the conditional prediction c, and takes one pass over the batch without `empty`.

    Raises `ConfigError` for a negative scale.
    """
    if scale < 0:
        raise ConfigError(f"guidance_scale = {scale}: must be 0 (no prompt), 1 (no guidance) or above")
    if scale == 1:
        prediction: Tensor = unet(latents_BCHW, timesteps_B, conditioning.context, conditioning.mask)
        return prediction
    both = Conditioning.concatenate([empty, conditioning])
    twice = unet(latents_BCHW.repeat(2, 1, 1, 1), timesteps_B.repeat(2), both.context, both.mask)
    without, within = torch.chunk(twice, 2)
    return without + scale * (within - without)
