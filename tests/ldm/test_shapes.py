"""Shapes of published models: every parameter is one of diffusers' network of the same config.json."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from ldm.shapes import (
    SD1_INPAINT_UNET,
    SD1_UNET,
    SD2_UNET,
    SDXL_REFINER_UNET,
    SDXL_UNET,
    X4_UPSCALER_UNET,
)
from ldm.unet import UNet2DCondition, UNetConfig

FOUR_LEVELS = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
    "in_channels": 4,
    "out_channels": 4,
}
SD1 = FOUR_LEVELS | {"sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}
SD2 = FOUR_LEVELS | {
    "sample_size": 96,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "dual_cross_attention": False,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "upcast_attention": None,
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "mid_block_only_cross_attention": None,
}
REFINER = SDXL | {
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "attention_head_dim": [6, 12, 24, 24],
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
UPSCALER = {
    "sample_size": 128,
    "in_channels": 7,
    "out_channels": 4,
    "block_out_channels": [256, 512, 512, 1024],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
    "attention_head_dim": 8,
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "only_cross_attention": [True, True, True, False],
    "num_class_embeds": 1000,
}
PUBLISHED = {
    "sd1": (SD1_UNET, SD1, 859_520_964),
    "sd1 inpainting": (SD1_INPAINT_UNET, SD1 | {"in_channels": 9}, 859_535_364),
    "sd2": (SD2_UNET, SD2, 865_910_724),
    "sdxl": (SDXL_UNET, SDXL, 2_567_463_684),
    "sdxl refiner": (SDXL_REFINER_UNET, REFINER, 2_259_526_660),
    "x4 upscaler": (X4_UPSCALER_UNET, UPSCALER, 473_398_020),
}


@pytest.mark.parametrize(("config", "file", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_every_parameter_has_diffusers_name_and_shape(
    config: UNetConfig, file: dict[str, Any], parameters: int
) -> None:
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**file)
        ours = UNet2DCondition(config)
    expected = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == expected
    assert sum(shape.numel() for shape in expected.values()) == parameters


@pytest.mark.parametrize(("config", "file"), [case[:2] for case in PUBLISHED.values()], ids=PUBLISHED)
def test_constants_are_what_the_files_say(config: UNetConfig, file: dict[str, Any]) -> None:
    assert UNetConfig.from_dict(file) == config
