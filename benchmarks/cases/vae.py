"""Encoding images: ours against diffusers, the same weights, under `inference_mode`.

Each side in the faster of float32 and bf16 weights on a CPU, in bf16 or float16 on a GPU; diffusers in either memory
format, with its projections of attention fused and not; each compiled where asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import diffusers
import torch
from cases.compare import COMPILED, Call, Make, Result, Side, compare

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL

REDUCED = (64, 128, 256, 256)
FULL = (128, 256, 512, 512)
TOLERANCES = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 3e-2}
"""Of moments; in few bits of mantissa both sides are rounded differently through 30 layers."""
CPU_AIM, CUDA_AIM, CUDA_AIM_COMPILED = 0.95, 1.3, 1.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run(*, quick: bool, device: str, compiled: bool) -> list[Result]:
    """On a CPU at half the width of Stable Diffusion's first stage; on a GPU at its width.

    Raises `AssertionError` if moments differ by more than rounding.
    """
    if not device.startswith("cuda"):
        batch, side, rounds = (1, 64, 3) if quick else (2, 128, 21)
        precisions = ("float32", "bfloat16")
        return [_encode(REDUCED, batch, side, precisions, device, rounds, try_compiled=compiled, aim=CPU_AIM)]
    sizes = ((4, 256),) if quick else ((4, 256), (4, 512))
    precisions = ("bfloat16",) if quick else ("bfloat16", "float16")
    rounds = 5 if quick else 20
    found = [_encode(FULL, *size, precisions, device, rounds, try_compiled=False, aim=CUDA_AIM) for size in sizes]
    if compiled:
        settings = [precision + COMPILED for precision in precisions]
        found += [
            _encode(FULL, *size, settings, device, rounds, try_compiled=False, aim=CUDA_AIM_COMPILED) for size in sizes
        ]
    return found


def _encode(
    widths: tuple[int, ...],
    batch: int,
    side: int,
    precisions: tuple[str, ...] | list[str],
    device: str,
    rounds: int,
    *,
    try_compiled: bool,
    aim: float,
) -> Result:
    make = _encoders(widths, batch, side, device)
    compiled = precisions[0].endswith(COMPILED)
    formats = ("channels_last",) if compiled else ("channels_last", "channels_last, fused projections", "contiguous")
    theirs = [_inserted(precision, form) for precision in precisions for form in formats]
    return compare(
        "vae encode",
        f"{'/'.join(map(str, widths))}, {side} px, batch {batch}{', both compiled' if compiled else ''}",
        Side(
            "ldm",
            {name: make(ours=True, setting=name) for name in precisions},
            (lambda name: make(ours=True, setting=name + COMPILED)) if try_compiled else None,
        ),
        Side(
            f"diffusers {diffusers.__version__}",
            {name: make(ours=False, setting=name) for name in theirs},
            (lambda name: make(ours=False, setting=name + COMPILED)) if try_compiled else None,
        ),
        device=device,
        rounds=rounds,
        aim=aim,
        tolerances=TOLERANCES,
    )


def _inserted(precision: str, form: str) -> str:
    first, _, rest = precision.partition(", ")
    return ", ".join(part for part in (first, form, rest) if part)


def _encoders(widths: tuple[int, ...], batch: int, side: int, device: str) -> Callable[..., Make]:
    """What builds a side's encoder in a setting, of one set of weights and pixels."""
    diffusers.utils.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = AutoencoderConfig(block_out_channels=widths)
    weights = diffusers.AutoencoderKL.from_config(config.to_dict()).state_dict()
    pixels = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def make(*, ours: bool, setting: str) -> Call:
        parts = setting.split(", ")
        dtype = DTYPES[parts[0]]
        images = pixels.to(device, dtype)
        if ours:
            own = AutoencoderKL(config)
            own.load_state_dict(weights)
            encode = own.to(device, dtype).for_inference().encode
        else:
            peer = diffusers.AutoencoderKL.from_config(config.to_dict())
            peer.load_state_dict(weights)
            peer = peer.to(device, dtype).eval().requires_grad_(False)
            if "channels_last" in parts:
                peer.to(memory_format=torch.channels_last)
            if "fused projections" in parts:
                peer.fuse_qkv_projections()

            def encode(images: torch.Tensor) -> torch.Tensor:
                moments: torch.Tensor = peer.encode(images).latent_dist.parameters
                return moments

        run = torch.compile(encode) if "compiled" in parts else encode

        @torch.inference_mode()
        def call() -> torch.Tensor:
            moments: torch.Tensor = run(images)
            return moments

        return call

    return lambda **which: partial(make, **which)
