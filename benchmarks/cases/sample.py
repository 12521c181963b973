"""Case `sample`: 20 steps of DPM-Solver++ with guidance and decoding, beside diffusers' StableDiffusionPipeline.

Both have the same weights, prompts and noise, and give the same images. Each in its faster precision; diffusers with
weights in channels_last, its projections of attention fused and not; each with its U-Net compiled where asked for.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from cases.compare import COMPILED, Call, Make, Result, Side, compare
from cases.unet import DEMO as DEMO_UNET
from cases.unet import HALF_SD1

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.conditioning.text import load_text_encoder
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.generate import LatentDiffusion, text_to_image
from ldm.interchange import load_model, save_model
from ldm.sampling import seeded_noise
from ldm.unet import UNet2DCondition, UNetConfig

STEPS = 20
GUIDANCE_SCALE = 3.0
CPU_AIM, CUDA_AIM, CUDA_AIM_COMPILED = 0.95, 1.3, 1.0
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = {"float32": 2 / 255, "bfloat16": 0.2}
"""Images are rounded to 8 bits: one step of difference, and one more for the order of sums. In bf16 each of 20 steps
rounds its own way."""

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


def run(*, quick: bool, device: str, compiled: bool) -> list[Result]:
    """The demo's shape, and Stable Diffusion 1's at half width unless `quick`."""
    shapes = [("demo shape, 64 px, 8 images", *DEMO, 8, 3 if quick else 7)]
    if not quick:
        shapes.append(("SD1 at half width, 256 px, 1 image", *HALF_WIDTH, 1, 3))
    if not device.startswith("cuda"):
        return [_case(*shape, device=device, try_compiled=compiled, aim=CPU_AIM) for shape in shapes]
    found = [_case(*shape, device=device, aim=CUDA_AIM) for shape in shapes]
    if compiled:
        found += [_case(*shape, device=device, all_compiled=True, aim=CUDA_AIM_COMPILED) for shape in shapes]
    return found


def _case(
    words: str,
    unet: UNetConfig,
    autoencoder: AutoencoderConfig,
    count: int,
    rounds: int,
    *,
    device: str,
    try_compiled: bool = False,
    all_compiled: bool = False,
    aim: float,
) -> Result:
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        make = _samplers(Path(folder), unet, autoencoder, count, device)
        end = COMPILED if all_compiled else ""
        kinds = ("",) if all_compiled else ("", ", fused projections")
        return compare(
            "sample",
            words + (", both compiled" if all_compiled else ""),
            Side(
                "ldm",
                {name: make(ours=True, setting=name) for name in (precision + end for precision in PRECISIONS)},
                (lambda name: make(ours=True, setting=name + COMPILED)) if try_compiled else None,
            ),
            Side(
                f"diffusers {diffusers.__version__}",
                {
                    name: make(ours=False, setting=name)
                    for name in (precision + kind + end for precision in PRECISIONS for kind in kinds)
                },
                (lambda name: make(ours=False, setting=name + COMPILED)) if try_compiled else None,
            ),
            device=device,
            rounds=rounds,
            aim=aim,
            tolerances=TOLERANCES,
        )


def _samplers(
    folder: Path, unet: UNetConfig, autoencoder: AutoencoderConfig, count: int, device: str
) -> Callable[..., Make]:
    """What builds a side in a setting, of one set of weights, prompts and noise."""
    torch.manual_seed(0)
    save_model(
        LatentDiffusion(
            UNet2DCondition(unet).eval().requires_grad_(False),
            AutoencoderKL(autoencoder).eval().requires_grad_(False),
            load_text_encoder("minilm"),
            Diffusion(DiffusionConfig(prediction="flow")),
        ),
        folder,
    )
    prompts = [f"a red apple on a table, picture {number}" for number in range(count)]
    noise = seeded_noise(range(count), (unet.in_channels, unet.sample_size, unet.sample_size))

    def of_ours(parts: list[str]) -> Call:
        model = load_model(folder, PRECISIONS[parts[0]]).to(device).for_inference()
        if "compiled" in parts:
            model.unet.compile()

        def call() -> torch.Tensor:
            images = text_to_image(
                model, prompts, noise=noise, steps=STEPS, guidance_scale=GUIDANCE_SCALE, sampler="dpmpp_2m"
            )
            return images.double() / 255

        return call

    def of_theirs(parts: list[str]) -> Call:
        dtype = PRECISIONS[parts[0]]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
        pipeline.set_progress_bar_config(disable=True)
        for network in (pipeline.unet, pipeline.vae):
            network.to(memory_format=torch.channels_last)
        if "fused projections" in parts:
            pipeline.fuse_qkv_projections()
        if "compiled" in parts:
            pipeline.unet.compile()

        def call() -> torch.Tensor:
            images = pipeline(
                prompts,
                latents=noise.to(device, dtype),
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE_SCALE,
                output_type="np",
            ).images
            return torch.from_numpy((images * 255).round()).double() / 255

        return call

    def make(*, ours: bool, setting: str) -> Call:
        parts = setting.split(", ")
        return of_ours(parts) if ours else of_theirs(parts)

    return lambda **which: partial(make, **which)
