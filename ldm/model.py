"""A latent diffusion model, whole: its networks, what conditions them, and the process they were trained for.

`ldm.generate` samples from it, `ldm.interchange` reads and writes it; it knows neither.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch

from ldm.autoencoder import AutoencoderKL, IdentityAutoencoder
from ldm.conditioning import TextEncoder
from ldm.conditioning.image import ImageEncoder
from ldm.diffusion import Diffusion
from ldm.samplers import SamplerOptions, Spacing
from ldm.unet import UNet2DCondition


@dataclass
class LatentDiffusion:
    """Parts that make one model, all on one device; networks may be of any floating dtype."""

    unet: UNet2DCondition
    autoencoder: AutoencoderKL | IdentityAutoencoder
    text_encoder: TextEncoder
    diffusion: Diffusion
    image_encoder: ImageEncoder | None = None
    """The encoder of what image variations read, in the place of text."""
    low_res_diffusion: Diffusion | None = None
    """The process that noises the low-resolution image which an upscaler is given."""
    max_noise_level: int = 350
    """The highest noise level that an upscaler was trained with."""
    aesthetics_score: bool = False
    """Whether `Conditioning.sizes` end with an aesthetic score, as SDXL's refiner takes them, and not a target size."""
    spacing: Spacing | None = None
    """Spacing of noise levels that the folder's scheduler asks for; None is the sampler's own."""
    sampler: str | None = None
    """The name in `ldm.samplers.SAMPLERS` of the solver that the folder's scheduler asks for; None: nothing is said."""
    sampler_options: SamplerOptions = field(default_factory=SamplerOptions)
    """Finer choices of the folder's scheduler, for `sampler` alone."""

    @property
    def device(self) -> torch.device:
        """Where the U-Net's weights are."""
        return self.unet.conv_in.weight.device

    @property
    def latent_channels(self) -> int:
        """Channels of what is sampled. The U-Net may take more: a mask, a second image."""
        return self.autoencoder.config.latent_channels

    def to(self, device: torch.device | str) -> Self:
        """The same model, moved, encoders too."""
        for part in (self.unet, self.autoencoder, self.text_encoder, self.image_encoder):
            if move := getattr(part, "to", None):
                move(device)
        return self

    def for_inference(self) -> Self:
        """The same model, ready to sample and no longer to be trained: weights in the order that convolutions are
        fastest with. What is saved of it stays the same."""
        self.unet.for_inference()
        self.autoencoder.for_inference()
        return self
