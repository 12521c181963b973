"""How noise grows over a process: ᾱ of the discrete ones, the shift of a flow's times, and evenly spread uniforms.

Pure functions, for `ldm.diffusion` and those who choose its settings.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import InputError

Number = TypeVar("Number", float, Tensor, NDArray[np.floating[Any]])

MAX_COSINE_BETA = 0.999
"""Nichol & Dhariwal 2021, section 3.2: no β is above this, or the last would be 1."""


def linear_alphas_cumprod(start: float, end: float, steps: int) -> Tensor:
    """ᾱ for evenly spaced β (Ho et al. 2020, section 4), float32 [steps]."""
    return (1 - torch.linspace(start, end, steps, dtype=torch.float32)).cumprod(dim=0)


def scaled_linear_alphas_cumprod(start: float, end: float, steps: int) -> Tensor:
    """ᾱ for β whose square roots are evenly spaced (Stable Diffusion), float32 [steps]."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float32).square()
    return (1 - betas).cumprod(dim=0)


def cosine_alphas_cumprod(steps: int) -> Tensor:
    """ᾱ = f(t)/f(0) with f(t) = cos²((t + 0.008)/1.008 · π/2), by its β, which are capped (Nichol & Dhariwal 2021,
    eq. 17), float32 [steps]."""
    f = [math.cos((step / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(steps + 1)]
    betas = [min(1 - f[step + 1] / f[step], MAX_COSINE_BETA) for step in range(steps)]
    return (1 - torch.tensor(betas, dtype=torch.float32)).cumprod(dim=0)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """The schedule shifted and stretched in √ᾱ so that the last step is noise alone and the first is as it was (Lin et
    al. 2023, algorithm 1)."""
    roots = alphas_cumprod.sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * (first / (first - last))).square()


def shifted(t: Number, shift: float) -> Number:
    """s·t/(1 + (s − 1)·t) for a flow's times in [0, 1]: above 1, more of the process is spent near the noise (Esser et
    al. 2024, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(latent_pixels: int, base_pixels: int) -> float:
    """√(m/n) for latents of m = height·width pixels, relative to n of the resolution that needs no shift: the same
    time then hides as much of an image, of which neighbouring pixels tell the same (Esser et al. 2024, eq. 23).

    Raises `InputError` unless both are 1 or more.
    """
    if latent_pixels < 1 or base_pixels < 1:
        raise InputError(f"latents of {latent_pixels} pixels, base of {base_pixels}: both must be 1 or more")
    return math.sqrt(latent_pixels / base_pixels)


def stratified(u_B: Tensor, positions_B: Tensor, batch_size: int) -> Tensor:
    """Uniform numbers that are evenly spread over a global batch, in [0, 1), of u's dtype: (position + u)/batch_size.

    Each position 0 … batch_size − 1 has its own part of the interval, so the times of a batch cover the process, and a
    loss over it varies less (Kingma et al. 2021, low-discrepancy sampler). It depends on a sample's own number and
    position alone, however a batch is dealt out to devices. Samples have to be in random order.

    Raises `InputError` for a batch size below 1, another number of positions, and on the CPU for numbers outside [0, 1)
    and positions outside the batch.
    """
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size}: must be 1 or more")
    check_unit_interval(u_B)
    fit = positions_B.shape == u_B.shape
    if fit and positions_B.device.type == "cpu":
        fit = bool(((positions_B >= 0) & (positions_B < batch_size)).all())
    if not fit:
        raise InputError(f"positions {positions_B.tolist()}: must be {len(u_B)} from 0 to {batch_size - 1}")
    spread = ((positions_B.double() + u_B.double()) / batch_size).to(u_B.dtype)
    below_one = torch.nextafter(torch.ones((), dtype=u_B.dtype), torch.zeros((), dtype=u_B.dtype))
    return spread.clamp(max=below_one.item())  # rounding may have made it 1


def check_unit_interval(u_B: Tensor) -> None:
    """Raises `InputError` for numbers outside [0, 1), on the CPU alone: to look at others, one waits for their
    device."""
    if u_B.device.type == "cpu" and not bool(((u_B >= 0) & (u_B < 1)).all()):
        raise InputError(f"u has values from {u_B.min().item()} to {u_B.max().item()}: must be in [0, 1)")
