from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given
from hypothesis import strategies as st

from ldm.autoencoder import AutoencoderConfig
from ldm.errors import ConfigError, InputError
from ldm.latents import (
    pixels_from_uint8,
    pixels_to_uint8,
    posterior_mean,
    sample_posterior,
    scale_latents,
    split_moments,
    unscale_latents,
)


@given(scale=st.floats(0.01, 100), shift=st.none() | st.floats(-10, 10))
def test_scaling_has_an_inverse(scale: float, shift: float | None) -> None:
    config = AutoencoderConfig(scaling_factor=scale, shift_factor=shift)
    latents = torch.linspace(-5, 5, 32, dtype=torch.float64).view(1, 2, 4, 4)
    torch.testing.assert_close(unscale_latents(scale_latents(latents, config), config), latents)


@given(
    means=st.lists(st.floats(-10, 10), min_size=2, max_size=2),
    stds=st.lists(st.floats(0.01, 100), min_size=2, max_size=2),
    scale=st.floats(0.01, 100),
)
def test_scaling_by_channel_has_an_inverse(means: list[float], stds: list[float], scale: float) -> None:
    config = AutoencoderConfig(
        latent_channels=2, latents_mean=tuple(means), latents_std=tuple(stds), scaling_factor=scale
    )
    latents = torch.linspace(-5, 5, 32, dtype=torch.float64).view(1, 2, 4, 4)
    scaled = scale_latents(latents, config)
    torch.testing.assert_close(unscale_latents(scaled, config), latents)
    for channel in (0, 1):
        torch.testing.assert_close(scaled[:, channel], (latents[:, channel] - means[channel]) * scale / stds[channel])


def test_scaling_by_channel_refuses_other_latents() -> None:
    config = AutoencoderConfig(latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)
    with pytest.raises(InputError, match=r"latents are \(1, 1, 2, 2\): must be \[batch, 4"):
        scale_latents(torch.zeros(1, 1, 2, 2), config)
    with pytest.raises(ConfigError, match="4 and None entries"):
        AutoencoderConfig(latents_mean=(0.0,) * 4)


def test_scaling_makes_unit_variance_of_the_standard_deviation_it_was_measured_at() -> None:
    latents = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1.5
    config = AutoencoderConfig(scaling_factor=1 / float(latents.std()), shift_factor=float(latents.mean()))
    scaled = scale_latents(latents, config)
    assert float(scaled.std()) == pytest.approx(1, abs=1e-5)
    assert float(scaled.mean()) == pytest.approx(0, abs=1e-5)


def test_posterior_is_that_of_diffusers() -> None:
    moments = torch.randn(2, 8, 4, 4) * 20
    theirs = DiagonalGaussianDistribution(moments)
    mean, log_variance = split_moments(moments)
    torch.testing.assert_close(mean, theirs.mean)
    torch.testing.assert_close(log_variance, theirs.logvar)
    noise = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(sample_posterior(moments, noise), theirs.mean + theirs.std * noise)
    torch.testing.assert_close(posterior_mean(moments), theirs.mode())


def test_posterior_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="log-variances"):
        split_moments(torch.zeros(1, 7, 2, 2))
    with pytest.raises(InputError, match="mean's shape"):
        sample_posterior(torch.zeros(2, 8, 2, 2), torch.zeros(1, 4, 2, 2))


@pytest.mark.parametrize("channels_last", [True, False])
def test_uint8_images_survive_the_round_trip(channels_last: bool) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 16, 20, 3), dtype=np.uint8))
    images[0, 0] = 0
    images[0, 1] = 255
    pixels = pixels_from_uint8(images if channels_last else images.permute(0, 3, 1, 2))
    assert pixels.shape == (2, 3, 16, 20)
    assert float(pixels.min()) == -1
    assert float(pixels.max()) == 1
    assert torch.equal(pixels_to_uint8(pixels), images)


def test_pixels_beyond_the_range_are_clipped() -> None:
    pixels = torch.tensor([-3.0, 3.0, 0.0]).view(1, 3, 1, 1)
    assert pixels_to_uint8(pixels).flatten().tolist() == [0, 255, 128]


def test_images_of_other_types_are_refused() -> None:
    with pytest.raises(InputError, match="must be uint8"):
        pixels_from_uint8(torch.zeros(1, 4, 4, 3))
    with pytest.raises(InputError, match="3 channels"):
        pixels_from_uint8(torch.zeros(1, 4, 4, 1, dtype=torch.uint8))
