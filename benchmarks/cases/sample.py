"""Case `sample`: 20 steps of DPM-Solver++ with guidance and decoding, beside diffusers' StableDiffusionPipeline.

Both have the same weights, prompts and noise, in eager mode, and give the same images.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from pathlib import Path

import torch
from cases.compare import Result, compare
from cases.unet import DEMO as DEMO_UNET
from cases.unet import HALF_SD1

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.conditioning.text import load_text_encoder
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.generate import LatentDiffusion, text_to_image
from ldm.interchange import save_model
from ldm.sampling import seeded_noise
from ldm.unet import UNet2DCondition, UNetConfig

STEPS = 20
GUIDANCE_SCALE = 3.0
AIMS = {"cpu": 1.3, "cuda": 1.5}
TOLERANCE = 2 / 255
"""Images are rounded to 8 bits: one step of difference, and one more for the order of sums."""

DEMO = (
    DEMO_UNET,
    AutoencoderConfig(
        block_out_channels=(16, 32, 64, 96), layers_per_block=1, latent_channels=8, norm_num_groups=16,
        mid_block_add_attention=False, sample_size=64,
    ),
)  # fmt: skip
HALF_WIDTH = (
    dataclasses.replace(HALF_SD1, cross_attention_dim=384),
    AutoencoderConfig(block_out_channels=(64, 128, 256, 256), sample_size=256),
)


def run(quick: bool, device: str) -> list[Result]:
    """The demo's shape, and Stable Diffusion 1's at half width unless `quick`."""
    results = [_case("demo shape, 64 px, 8 images", *DEMO, count=8, rounds=3 if quick else 7, device=device)]
    if not quick:
        results.append(_case("SD1 at half width, 256 px, 1 image", *HALF_WIDTH, count=1, rounds=3, device=device))
    return results


def _case(
    setting: str, unet: UNetConfig, autoencoder: AutoencoderConfig, *, count: int, rounds: int, device: str
) -> Result:
    import diffusers

    torch.manual_seed(0)
    model = LatentDiffusion(
        UNet2DCondition(unet).eval().requires_grad_(False),
        AutoencoderKL(autoencoder).eval().requires_grad_(False),
        load_text_encoder("minilm"),
        Diffusion(DiffusionConfig(prediction="flow")),
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_model(model, Path(folder))
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    model = model.to(device).for_inference()
    prompts = [f"a red apple on a table, picture {number}" for number in range(count)]
    noise = seeded_noise(range(count), (unet.in_channels, unet.sample_size, unet.sample_size))

    def ours() -> torch.Tensor:
        images = text_to_image(model, prompts, noise=noise, steps=STEPS, guidance_scale=GUIDANCE_SCALE)
        return images.double() / 255

    def theirs() -> torch.Tensor:
        images = pipeline(
            prompts, latents=noise, num_inference_steps=STEPS, guidance_scale=GUIDANCE_SCALE, output_type="np"
        ).images
        return torch.from_numpy((images * 255).round()).double() / 255

    return compare(
        "sample",
        setting,
        device=device,
        peer="diffusers",
        ours=ours,
        theirs=theirs,
        rounds=rounds,
        tolerance=TOLERANCE,
        aim=AIMS[device.partition(":")[0]],
    )
