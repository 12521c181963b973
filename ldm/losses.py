"""Training losses of the autoencoder. The diffusion's loss is `Diffusion.loss_weight` on squared errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ldm.errors import InputError
from ldm.latents import split_moments

POOL = 4
"""Side of the averages that `pooled_l1` compares."""


@dataclass(frozen=True)
class AutoencoderLossWeights:
    """Weights of the terms; 0 leaves one out."""

    l1: float = 1.0
    mse: float = 1.0
    gradient_l1: float = 1.0
    pooled_l1: float = 1.0
    kl: float = 1e-6
    """KL divergence per latent value, so that the weight doesn't depend on the resolution."""


def l1(reconstruction_BCHW: Tensor, pixels_BCHW: Tensor) -> Tensor:
    """Mean absolute error, a scalar."""
    return (reconstruction_BCHW - pixels_BCHW).abs().mean()


def mse(reconstruction_BCHW: Tensor, pixels_BCHW: Tensor) -> Tensor:
    """Mean squared error, a scalar."""
    return (reconstruction_BCHW - pixels_BCHW).square().mean()


def gradient_l1(reconstruction_BCHW: Tensor, pixels_BCHW: Tensor) -> Tensor:
    """Mean absolute error of the differences of neighbours, horizontal plus vertical, a scalar: keeps edges sharp."""
    error = reconstruction_BCHW - pixels_BCHW
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def pooled_l1(reconstruction_BCHW: Tensor, pixels_BCHW: Tensor) -> Tensor:
    """Mean absolute error of 4x4 averages, a scalar: keeps colours of areas."""
    return F.avg_pool2d(reconstruction_BCHW - pixels_BCHW, POOL).abs().mean()


def kl_divergence(moments_BCHW: Tensor) -> Tensor:
    """KL divergence of the posterior from a standard normal (Kingma & Welling 2014, appendix B), mean over all latent
    values, a scalar."""
    mean, log_variance = split_moments(moments_BCHW)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def autoencoder_loss(
    reconstruction_BCHW: Tensor, pixels_BCHW: Tensor, moments_BCHW: Tensor, weights: AutoencoderLossWeights
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum, a float32 scalar, and its terms before weighting, detached, for the record.

    Terms whose weight is 0 are not computed. Raises `InputError` if the images differ in shape.
    """
    if reconstruction_BCHW.shape != pixels_BCHW.shape:
        shapes = f"{tuple(reconstruction_BCHW.shape)} and {tuple(pixels_BCHW.shape)}"
        raise InputError(f"reconstruction and pixels are {shapes}: must be of one shape")
    reconstruction, pixels, moments = reconstruction_BCHW.float(), pixels_BCHW.float(), moments_BCHW.float()
    terms = {
        term.__name__: term(reconstruction, pixels)
        for term in (l1, mse, gradient_l1, pooled_l1)
        if getattr(weights, term.__name__)
    }
    if weights.kl:
        terms["kl"] = kl_divergence(moments)
    total = torch.zeros((), device=pixels.device)
    for name, value in terms.items():
        total = total + getattr(weights, name) * value
    return total, {name: value.detach() for name, value in terms.items()}
