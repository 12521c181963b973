"""From the recipe's models to the configurations that `ldm` builds networks and diffusion from."""

from __future__ import annotations

from ldm.autoencoder import AutoencoderConfig
from ldm.diffusion import DiffusionConfig
from ldm.unet import UNetConfig
from pipelines.recipe import AutoencoderModel, TextToImageModel
from pipelines.train.errors import TrainError


def autoencoder_config(model: AutoencoderModel, size_px: int) -> AutoencoderConfig:
    """For square images of `size_px`.

    Raises `TrainError` if the network can't take that size; `ldm.errors.ConfigError` if there is no such network.
    """
    config = AutoencoderConfig(**model.network.model_dump(), sample_size=size_px)
    if size_px % config.downsampling:
        raise TrainError(
            f"images are {size_px} px, but a network of {len(config.block_out_channels)} resolutions needs multiples of"
            f" {config.downsampling}; change acquire.image.size_px or network.block_out_channels"
        )
    return config


def unet_config(model: TextToImageModel, *, latent_channels: int, sample_size: int, context_width: int) -> UNetConfig:
    """For latents of `sample_size` a side. Raises `ldm.errors.ConfigError` if there is no such network."""
    network = model.network
    attends = network.cross_attention
    return UNetConfig(
        in_channels=latent_channels,
        out_channels=latent_channels,
        sample_size=sample_size,
        down_block_types=tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        cross_attention_dim=context_width,
        **network.model_dump(exclude={"cross_attention"}),
    )


def diffusion_config(model: TextToImageModel) -> DiffusionConfig:
    """Raises `ldm.errors.ConfigError` for a combination that makes no sense."""
    return DiffusionConfig(**model.diffusion.model_dump(exclude={"caption_dropout"}))
