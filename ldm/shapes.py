"""Shapes of published U-Nets, as their config.json give them: weights of these models fit without a change of names."""

from __future__ import annotations

import dataclasses

from ldm.unet import UNetConfig

SD1_UNET = UNetConfig()
"""Stable Diffusion 1.1 to 1.5 (Rombach et al. 2022): 512 pixels, CLIP ViT-L/14."""

SD1_INPAINT_UNET = dataclasses.replace(SD1_UNET, in_channels=9)
"""Stable Diffusion 1 inpainting: latents, then the mask, then the masked image's latents."""

SD2_UNET = UNetConfig(
    sample_size=96,
    attention_head_dim=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
    upcast_attention=True,
)
"""Stable Diffusion 2.1: 768 pixels, OpenCLIP ViT-H/14. The base model of 512 pixels has `sample_size` 64."""

SDXL_UNET = UNetConfig(
    sample_size=128,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
"""Stable Diffusion XL base 1.0 (Podell et al. 2023): 1024 pixels, two CLIP towers, a pooled vector of 1280, 6 sizes."""

SDXL_REFINER_UNET = UNetConfig(
    sample_size=128,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(384, 768, 1536, 1536),
    transformer_layers_per_block=4,
    attention_head_dim=(6, 12, 24, 24),
    cross_attention_dim=1280,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2560,
)
"""Stable Diffusion XL refiner 1.0: OpenCLIP ViT-bigG/14 alone, a pooled vector of 1280, 5 sizes."""

X4_UPSCALER_UNET = UNetConfig(
    in_channels=7,
    sample_size=128,
    down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    up_block_types=(*("CrossAttnUpBlock2D",) * 3, "UpBlock2D"),
    block_out_channels=(256, 512, 512, 1024),
    cross_attention_dim=1024,
    use_linear_projection=True,
    only_cross_attention=(True, True, True, False),
    num_class_embeds=1000,
)
"""Stable Diffusion x4 upscaler: latents, then the noisy low-resolution image's three channels."""
