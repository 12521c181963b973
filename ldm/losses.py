"""Training losses of the autoencoder: of its reconstructions, of its posterior, and adversarial.

The diffusion's loss is `Diffusion.loss_weight` on squared errors. The networks that judge reconstructions are
`ldm.perceptual` and `ldm.discriminator`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ldm.errors import ConfigError, InputError
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
    perceptual: float = 0.0


@dataclass(frozen=True)
class AdversarialWeights:
    """How much a discriminator's judgement counts, and from when."""

    weight: float = 0.5
    """Weight of the generator's loss, beside the adaptive weight."""
    start_step: int = 50_001
    """Before this optimizer step reconstruction comes first: the generator's loss isn't taken."""


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


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Minus the mean logit of reconstructions, a scalar: the hinge loss's other side (Lim & Ye 2017)."""
    return -fake_logits.float().mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss (Lim & Ye 2017), the mean over images and reconstructions, a scalar: 0 where logits are beyond ±1.

    The reconstructions must have been detached.
    """
    return 0.5 * (F.relu(1 - real_logits.float()).mean() + F.relu(1 + fake_logits.float()).mean())


def adaptive_weight(
    reconstruction_loss: Tensor, gan_loss: Tensor, last_layer: Tensor, *, delta: float = 1e-6, largest: float = 1e4
) -> Tensor:
    """λ = |∇ reconstruction_loss| / (|∇ gan_loss| + delta), at most `largest` (Esser et al. 2021, eq. 7), detached.

    Gradients are those of the decoder's last weight, `decoder.conv_out.weight`: with λ, neither loss drowns the other
    there. The graph stays for the backward pass. Raises `InputError` if a loss doesn't depend on it.
    """
    norms: list[Tensor] = []
    for name, loss in (("reconstruction", reconstruction_loss), ("gan", gan_loss)):
        if not (loss.requires_grad and last_layer.requires_grad):
            raise InputError(f"the {name} loss has no gradient: it and the last layer must require one")
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise InputError(f"the {name} loss doesn't depend on the last layer: give the decoder's conv_out.weight")
        norms.append(gradient.float().norm())
    weight: Tensor = norms[0] / (norms[1] + delta)
    return weight.clamp(max=largest).detach()


def adversarial_loss(
    autoencoder_terms: Tensor, fake_logits: Tensor, last_layer: Tensor, weights: AdversarialWeights, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the discriminator adds to the autoencoder's loss at optimizer step `step`, a float32 scalar, and its terms.

    `autoencoder_terms` is the total of `autoencoder_loss`; 0 before `weights.start_step`.
    """
    if step < weights.start_step:
        return torch.zeros((), device=fake_logits.device), {}
    loss = generator_loss(fake_logits)
    adaptive = adaptive_weight(autoencoder_terms, loss, last_layer)
    return weights.weight * adaptive * loss, {"generator": loss.detach(), "adaptive_weight": adaptive}


def autoencoder_loss(
    reconstruction_BCHW: Tensor,
    pixels_BCHW: Tensor,
    moments_BCHW: Tensor,
    weights: AutoencoderLossWeights,
    perceptual: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum, a float32 scalar, and its terms before weighting, detached, for the record.

    `perceptual` is `Perceptual`, or another function of two images to distances [B]. Terms whose weight is 0 are not
    computed. Raises `InputError` if the images differ in shape, `ConfigError` if `perceptual` has a weight and is None.
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
    if weights.perceptual:
        if perceptual is None:
            raise ConfigError(f"perceptual weight {weights.perceptual}: give the distance too, or leave the weight 0")
        terms["perceptual"] = perceptual(reconstruction, pixels).float().mean()
    if weights.kl:
        terms["kl"] = kl_divergence(moments)
    total = torch.zeros((), device=pixels.device)
    for name, value in terms.items():
        total = total + getattr(weights, name) * value
    return total, {name: value.detach() for name, value in terms.items()}
