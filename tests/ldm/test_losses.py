from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from ldm.autoencoder import AutoencoderKL
from ldm.discriminator import PatchDiscriminator
from ldm.errors import ConfigError, InputError
from ldm.latents import split_moments
from ldm.losses import (
    AdversarialWeights,
    AutoencoderLossWeights,
    adaptive_weight,
    adversarial_loss,
    autoencoder_loss,
    discriminator_loss,
    generator_loss,
    gradient_l1,
    kl_divergence,
    pooled_l1,
)
from ldm.metrics import psnr

PIXELS = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
MOMENTS = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(1))


def test_a_constant_error_has_no_gradient_and_stays_when_pooled() -> None:
    assert float(gradient_l1(PIXELS + 0.25, PIXELS)) == pytest.approx(0, abs=1e-6)
    assert float(pooled_l1(PIXELS + 0.25, PIXELS)) == pytest.approx(0.25, rel=1e-5)


def test_a_checkerboard_error_has_a_gradient_and_vanishes_when_pooled() -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(8)
    error = 0.1 * signs[:, None] * signs[None, :]
    assert float(gradient_l1(PIXELS + error, PIXELS)) == pytest.approx(0.4, rel=1e-5)
    assert float(pooled_l1(PIXELS + error, PIXELS)) == pytest.approx(0, abs=1e-6)


def test_kl_is_that_of_the_distributions() -> None:
    mean, log_variance = split_moments(MOMENTS)
    expected = torch_kl(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_divergence(MOMENTS), expected)
    assert float(kl_divergence(torch.zeros(1, 2, 1, 1))) == 0


def test_total_is_the_weighted_sum_of_the_terms() -> None:
    weights = AutoencoderLossWeights(l1=1, mse=2, gradient_l1=3, pooled_l1=4, kl=5)
    total, terms = autoencoder_loss(PIXELS.flip(0), PIXELS, MOMENTS, weights)
    assert set(terms) == {"l1", "mse", "gradient_l1", "pooled_l1", "kl"}
    assert float(total) == pytest.approx(sum(getattr(weights, name) * float(value) for name, value in terms.items()))


def test_terms_without_weight_are_left_out() -> None:
    total, terms = autoencoder_loss(PIXELS + 0.5, PIXELS, MOMENTS, AutoencoderLossWeights(0, 1, 0, 0, 0))
    assert set(terms) == {"mse"}
    assert float(total) == pytest.approx(0.25, rel=1e-5)


def test_losses_of_half_precision_are_taken_in_full_and_differentiable() -> None:
    reconstruction = PIXELS.flip(0).bfloat16().requires_grad_()
    total, _ = autoencoder_loss(reconstruction, PIXELS, MOMENTS.bfloat16(), AutoencoderLossWeights())
    total.backward()
    assert total.dtype == torch.float32
    assert reconstruction.grad is not None
    assert reconstruction.grad.isfinite().all()


def test_other_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="of one shape"):
        autoencoder_loss(PIXELS[:1], PIXELS, MOMENTS, AutoencoderLossWeights())
    with pytest.raises(InputError, match="of one shape"):
        psnr(PIXELS[:1], PIXELS)


def test_perceptual_term_is_the_mean_of_its_distances() -> None:
    weights = AutoencoderLossWeights(0, 0, 0, 0, 0, perceptual=3)
    distances = torch.tensor([0.2, 0.6])
    total, terms = autoencoder_loss(PIXELS, PIXELS, MOMENTS, weights, lambda one, other: distances)
    assert float(terms["perceptual"]) == pytest.approx(0.4)
    assert float(total) == pytest.approx(1.2)
    with pytest.raises(ConfigError, match="perceptual weight 3"):
        autoencoder_loss(PIXELS, PIXELS, MOMENTS, weights)


@pytest.mark.parametrize(("real", "fake", "expected"), [(0, 0, 1.0), (2, -2, 0.0), (-1, 3, 3.0), (1, 0, 0.5)])
def test_hinge_loss_of_known_logits(real: float, fake: float, expected: float) -> None:
    assert float(discriminator_loss(torch.full((2, 1, 3, 3), real), torch.full((2, 1, 3, 3), fake))) == expected


def test_generator_loss_rises_as_logits_fall() -> None:
    assert float(generator_loss(torch.tensor([1.0, -3.0]))) == 1.0


def test_adaptive_weight_of_losses_with_known_gradients() -> None:
    """Of 3·Σw and 0.5·Σw over 4 weights, gradients are 3 and 0.5 everywhere: norms 6 and 1."""
    last = torch.ones(4, requires_grad=True)
    assert float(adaptive_weight(3 * last.sum(), 0.5 * last.sum(), last)) == pytest.approx(6)
    assert float(adaptive_weight(3 * last.sum(), 0.5 * last.sum(), last, delta=2)) == pytest.approx(2)
    assert float(adaptive_weight(3 * last.sum(), 0 * last.sum(), last)) == 1e4


def test_adversarial_loss_of_an_autoencoder(autoencoder: AutoencoderKL) -> None:
    """λ against norms taken by the backward pass; the gradients it balances; the start."""
    discriminator = PatchDiscriminator(width=4, layers=1, generator=torch.Generator().manual_seed(0)).eval()
    last = autoencoder.decoder.conv_out.weight
    norms = []
    for loss in (
        lambda: autoencoder_loss(*reconstructed(autoencoder), AutoencoderLossWeights())[0],
        lambda: -discriminator(autoencoder(PIXELS)[0]).mean(),
    ):
        autoencoder.zero_grad()
        loss().backward()
        assert last.grad is not None
        norms.append(float(last.grad.norm()))
    images = reconstructed(autoencoder)
    total, _ = autoencoder_loss(*images, AutoencoderLossWeights())
    logits = discriminator(images[0])
    weights = AdversarialWeights(weight=0.8, start_step=100)
    added, terms = adversarial_loss(total, logits, last, weights, step=100)
    assert float(terms["adaptive_weight"]) == pytest.approx(norms[0] / norms[1], rel=1e-3)
    assert float(added.detach()) == pytest.approx(-0.8 * norms[0] / norms[1] * float(logits.detach().mean()), rel=1e-3)
    autoencoder.zero_grad()
    added.backward()
    assert float(last.grad.norm()) == pytest.approx(0.8 * norms[0], rel=1e-3)
    early, early_terms = adversarial_loss(total, logits, last, weights, step=99)
    assert float(early) == 0
    assert not early_terms


def reconstructed(autoencoder: AutoencoderKL) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    reconstruction, moments = autoencoder(PIXELS)
    return reconstruction, PIXELS, moments


def test_adaptive_weight_needs_a_layer_that_both_losses_pass() -> None:
    last, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    with pytest.raises(InputError, match="gan loss doesn't depend"):
        adaptive_weight(last.sum(), other.sum(), last)
    with pytest.raises(InputError, match="reconstruction loss has no gradient"):
        adaptive_weight(last.detach().sum(), last.sum(), last)


def test_psnr_of_a_known_error() -> None:
    reference = torch.zeros(2, 3, 8, 8)
    pixels = torch.stack([reference[0] + 0.2, reference[1]])
    values = psnr(pixels, reference)
    assert float(values[0]) == pytest.approx(20 * math.log10(2 / 0.2), abs=1e-4)
    assert values[1] == math.inf
    assert psnr(reference[:1] + 5, reference[:1] + 1).tolist() == [math.inf]
