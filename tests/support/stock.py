"""Stock pipelines of diffusers with tiny random networks, one for each kind of model folder."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers

KINDS = (
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionUpscalePipeline",
    "StableDiffusionImageVariationPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionXLInpaintPipeline",
    "StableDiffusionXLImg2ImgPipeline",
)
WIDTH, SECOND_WIDTH, POOLED, SIZE_WIDTH = 64, 96, 24, 8
"""Of the first and the second tower's states: diffusers tells towers apart by them."""


def stock_pipeline(kind: str, **unet: Any) -> Any:
    """A pipeline of that class. `unet` are further settings of its U-Net's."""
    torch.manual_seed(3)
    xl, refiner = "XL" in kind, kind == "StableDiffusionXLImg2ImgPipeline"
    settings: dict[str, Any] = {}
    if "Inpaint" in kind:
        settings["in_channels"] = 9
    elif kind == "StableDiffusionUpscalePipeline":
        settings |= {"in_channels": 7, "num_class_embeds": 1000, "only_cross_attention": (True, False)}
    if xl:
        settings |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_WIDTH,
            "projection_class_embeddings_input_dim": POOLED + (5 if refiner else 6) * SIZE_WIDTH,
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
        }
    settings["cross_attention_dim"] = SECOND_WIDTH if refiner else WIDTH + SECOND_WIDTH * xl
    network = diffusers.UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "attention_head_dim": (2, 4),
            "norm_num_groups": 8,
        }
        | settings
        | unet
    )
    parts: dict[str, Any] = {"unet": network, "vae": _autoencoder(kind), "scheduler": _scheduler()}
    safety: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    if xl:
        parts |= _towers(first=not refiner)
        parts |= {"requires_aesthetics_score": True} if refiner else {}
        parts["force_zeros_for_empty_prompt"] = not refiner
    elif kind == "StableDiffusionImageVariationPipeline":
        parts |= safety | _vision()
    elif kind == "StableDiffusionUpscalePipeline":
        low_res = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001, beta_end=0.02)
        parts |= {"low_res_scheduler": low_res, "max_noise_level": 250, **_text()}
    else:
        parts |= safety | _text()
    pipeline = getattr(diffusers, kind)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_tower(
    *,
    projected: bool = False,
    act: str = "quick_gelu",
    layers: int = 2,
    width: int = WIDTH,
    vocabulary: int | None = None,
    end: int = 1,
) -> Any:
    """A tower of CLIP, for `tokenizer`'s tokens if `vocabulary` is None."""
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary or len(tokenizer()),
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=1,
        hidden_act=act,
        projection_dim=POOLED,
        bos_token_id=end - 1,
        eos_token_id=end,
    )
    network = kind(config).eval()
    torch.nn.init.normal_(network.get_input_embeddings().weight)
    return network


def tokenizer(pad: str = "<|endoftext|>") -> Any:
    """CLIP's tokenizer without merges: bytes, and bytes at the end of a word."""
    characters = [chr(byte) for byte in range(33, 127)]
    names = ["<|startoftext|>", "<|endoftext|>", *characters, *(f"{character}</w>" for character in characters)]
    vocabulary = {name: number for number, name in enumerate(names)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=77)


def _autoencoder(kind: str) -> Any:
    upscale = kind == "StableDiffusionUpscalePipeline"
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.08333 if upscale else 0.5,
        sample_size=16,
    )


def _scheduler() -> Any:
    return diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, final_sigmas_type="zero"
    )


def _text() -> dict[str, Any]:
    return {"text_encoder": text_tower(), "tokenizer": tokenizer()}


def _towers(*, first: bool) -> dict[str, Any]:
    return {
        "text_encoder": text_tower() if first else None,
        "tokenizer": tokenizer() if first else None,
        "text_encoder_2": text_tower(projected=True, act="gelu", layers=3, width=SECOND_WIDTH),
        "tokenizer_2": tokenizer("!"),
    }


def _vision() -> dict[str, Any]:
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=WIDTH,
    )
    return {
        "image_encoder": transformers.CLIPVisionModelWithProjection(config).eval(),
        "feature_extractor": transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ),
    }
