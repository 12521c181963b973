from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as torch_kl

from ldm.errors import InputError
from ldm.latents import split_moments
from ldm.losses import AutoencoderLossWeights, autoencoder_loss, gradient_l1, kl_divergence, pooled_l1
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


def test_psnr_of_a_known_error() -> None:
    reference = torch.zeros(2, 3, 8, 8)
    pixels = torch.stack([reference[0] + 0.2, reference[1]])
    values = psnr(pixels, reference)
    assert float(values[0]) == pytest.approx(20 * math.log10(2 / 0.2), abs=1e-4)
    assert values[1] == math.inf
    assert psnr(reference[:1] + 5, reference[:1] + 1).tolist() == [math.inf]
