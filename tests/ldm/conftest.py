"""Small networks and a real text encoder, for all tests of the model library."""

from __future__ import annotations

import pytest
import torch

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.conditioning.text import TransformersTextEncoder, load_text_encoder
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.generate import LatentDiffusion
from ldm.unet import UNet2DCondition, UNetConfig


@pytest.fixture(scope="session")
def minilm() -> TransformersTextEncoder:
    return load_text_encoder("minilm")


@pytest.fixture
def text_encoder(minilm: TransformersTextEncoder) -> TransformersTextEncoder:
    """What `model` reads prompts with; a module may take a smaller one."""
    return minilm


@pytest.fixture
def unet() -> UNet2DCondition:
    """A U-Net of one plain and one attending resolution, for 8x8 latents and MiniLM's states."""
    torch.manual_seed(0)
    config = UNetConfig(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=384,
        norm_num_groups=8,
    )
    return UNet2DCondition(config).eval()


@pytest.fixture
def autoencoder() -> AutoencoderKL:
    torch.manual_seed(1)
    config = AutoencoderConfig(
        block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=8, scaling_factor=1.3, sample_size=32
    )
    return AutoencoderKL(config).eval()


@pytest.fixture
def model(unet: UNet2DCondition, autoencoder: AutoencoderKL, text_encoder: TransformersTextEncoder) -> LatentDiffusion:
    return LatentDiffusion(unet, autoencoder, text_encoder, Diffusion(DiffusionConfig(prediction="flow")))
