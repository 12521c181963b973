"""From the recipe's models to the configurations that `ldm` builds networks and diffusion from."""

from __future__ import annotations

import math
from typing import Any

import torch

from ldm.autoencoder import AutoencoderConfig
from ldm.conditioning import TextEncoder
from ldm.conditioning.text import load_text_encoder
from ldm.diffusion import DiffusionConfig
from ldm.initial import initialise_unet
from ldm.unet import UNet2DCondition, UNetConfig
from pipelines.recipe import AutoencoderModel, ClipModel, ClipNetwork, TextToImageModel
from pipelines.recipe.errors import RecipeError


def autoencoder_config(model: AutoencoderModel, size_px: int) -> AutoencoderConfig:
    """The autoencoder's configuration for square images of `size_px`.

    Raises `RecipeError` if the network can't take that size; `ldm.errors.ConfigError` if there is no such network.
    """
    config = AutoencoderConfig(**model.network.model_dump(), sample_size=size_px)
    if size_px % config.downsampling:
        raise RecipeError(
            f"images are {size_px} px, but a network of {len(config.block_out_channels)} resolutions needs multiples of"
            f" {config.downsampling}; change acquire.image.size_px or network.block_out_channels"
        )
    return config


def clip_misfits(network: ClipNetwork, size_px: int | None) -> dict[str, str]:
    """What of a CLIP's shape does not go together, by field, for square images of `size_px`, or of a side not known."""
    size_px = network.image_px or size_px
    vit = network.image_tower == "vit"
    widths = {name: getattr(network, name) for name in (("image_width", "text_width") if vit else ("text_width",))}
    misfits = {}
    bad = [f"{name} {width}" for name, width in widths.items() if width % network.head_width]
    if bad:
        misfits["head_width"] = (
            f"{network.head_width} must divide {' and '.join(bad)}; give a divisor of"
            f" {' and '.join(widths)}, such as {math.gcd(*widths.values())}"
        )
    if vit and size_px is not None and size_px % network.patch_size:
        misfits["patch_size"] = (
            f"{network.patch_size} must divide the images' side, {size_px} px; give a divisor, or another image_px"
        )
    return misfits


def clip_config(model: ClipModel, size_px: int) -> dict[str, Any]:
    """open_clip's `model_cfg` for square images of `size_px`. Raises `RecipeError` if the widths don't fit."""
    network = model.network
    for field, message in clip_misfits(network, size_px).items():
        raise RecipeError(f"network.{field}: {message}")
    size_px = network.image_px or size_px
    vit = network.image_tower == "vit"
    transformer = {
        "patch_size": network.patch_size,
        "width": network.image_width,
        "layers": network.image_layers,
        "head_width": network.head_width,
    }
    pretrained = {
        "timm_model_name": f"tf_{network.image_tower}",
        "timm_model_pretrained": False,  # open_clip would ask a hub; `ldm.clip` takes them from their package
        "timm_pool": "avg",
        "timm_proj": "linear",
    }
    return {
        "embed_dim": network.embed_dim,
        "nonscalar_logit_scale": True,  # DeepSpeed can't broadcast parameters without dimensions
        **({} if vit else {"custom_text": True}),
        "vision_cfg": {"image_size": size_px, **(transformer if vit else pretrained)},
        "text_cfg": {
            "context_length": network.context_length,
            "vocab_size": 49408,
            "width": network.text_width,
            "heads": network.text_width // network.head_width,
            "layers": network.text_layers,
        },
    }


def unet_config(model: TextToImageModel, *, latent_channels: int, sample_size: int, context_width: int) -> UNetConfig:
    """The U-Net's configuration for latents of `sample_size` a side. Raises `ldm.errors.ConfigError` if there is no
    such network."""
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


def reading(model: TextToImageModel) -> tuple[TextEncoder, DiffusionConfig]:
    """The text encoder of a model, loaded, and the process that it was trained for.

    Raises `ldm.errors.LdmError` if either can't be had.
    """
    text = model.text
    return load_text_encoder(text.encoder, text.tokens, text.form), diffusion_config(model)


def diffusion_config(model: TextToImageModel) -> DiffusionConfig:
    """Raises `ldm.errors.ConfigError` for a combination that makes no sense."""
    return DiffusionConfig(**model.diffusion.model_dump(exclude={"caption_dropout", "stratified_timesteps"}))


def initial_unet(config: UNetConfig, seed: int) -> UNet2DCondition:
    """The network that training with this seed begins from. Leaves the global random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet2DCondition(config)
        initialise_unet(network)
    return network
