"""Encoding images: ours against diffusers, the same weights, both in eager mode under `inference_mode`."""

from __future__ import annotations

import diffusers
import torch
from cases.compare import Result, compare

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL

REDUCED = (64, 128, 256, 256)
FULL = (128, 256, 512, 512)
HALF_TOLERANCE = 3e-2
"""Of moments in 8 bits of mantissa, both sides rounded differently through 30 layers."""
TOLERANCE = 1e-4


def run(quick: bool, device: str) -> list[Result]:
    """On a CPU at half the width of Stable Diffusion's first stage in float32; on a GPU at its width in half precision.

    Raises `AssertionError` if moments differ by more than rounding.
    """
    if device.startswith("cuda"):
        sizes = ((4, 256),) if quick else ((4, 256), (4, 512))
        dtypes = (torch.bfloat16,) if quick else (torch.bfloat16, torch.float16)
        return [
            _encode(FULL, batch, side, dtype, device, rounds=5 if quick else 20, aim=1.5)
            for dtype in dtypes
            for batch, side in sizes
        ]
    return [
        _encode(REDUCED, 1 if quick else 2, 64 if quick else 128, torch.float32, device, 3 if quick else 21, aim=1.2)
    ]


def _encode(
    widths: tuple[int, ...], batch: int, side: int, dtype: torch.dtype, device: str, rounds: int, aim: float
) -> Result:
    torch.manual_seed(0)
    config = AutoencoderConfig(block_out_channels=widths)
    theirs = diffusers.AutoencoderKL.from_config(config.to_dict()).to(device, dtype).eval().requires_grad_(False)
    ours = AutoencoderKL(config)
    ours.load_state_dict(theirs.state_dict())
    ours.to(device, dtype).for_inference()
    pixels = (torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1).to(device, dtype)
    with torch.inference_mode():
        return compare(
            "vae encode",
            f"{'/'.join(map(str, widths))}, {side} px, {str(dtype).removeprefix('torch.')}, batch {batch}",
            device=device,
            peer="diffusers",
            ours=lambda: ours.encode(pixels),
            theirs=lambda: theirs.encode(pixels).latent_dist.parameters,
            rounds=rounds,
            tolerance=TOLERANCE if dtype == torch.float32 else HALF_TOLERANCE,
            aim=aim,
        )
