from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL, IdentityAutoencoder, IdentityConfig
from ldm.errors import ConfigError, InputError
from ldm.tiling import Tiling, decode_in_parts, decode_tiled, encode_in_parts, encode_tiled

IDENTITY = IdentityAutoencoder(IdentityConfig())


class Local:
    """A first stage of factor 4 without normalisation and attention, whose convolutions see 1 latent position aside."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(in_channels=3, out_channels=3, latent_channels=3, downsampling=4)
        self.largest = 0

    def encode(self, pixels: Tensor) -> Tensor:
        self.largest = max(self.largest, pixels[:, 0].numel())
        return self._blur(F.avg_pool2d(pixels, 4)).repeat(1, 2, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        self.largest = max(self.largest, latents[:, 0].numel() * 16)
        return F.interpolate(self._blur(latents), scale_factor=4, mode="nearest")

    def _blur(self, x: Tensor) -> Tensor:
        return F.conv2d(x, torch.full((3, 1, 3, 3), 1 / 9, dtype=x.dtype), padding=1, groups=3)


@given(length=st.integers(1, 200), size=st.integers(1, 40), overlap=st.integers(0, 39))
def test_tiles_cover_a_side_and_overlap_enough(length: int, size: int, overlap: int) -> None:
    if overlap >= size:
        return
    starts = Tiling(size, overlap).starts(length)
    assert starts[0] == 0
    assert starts[-1] == max(length - size, 0)
    assert all(0 < after - before <= size - overlap for before, after in pairwise(starts))


@given(height=st.integers(1, 40), width=st.integers(1, 40), size=st.integers(2, 12), overlap=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_weights_of_tiles_add_up_to_one(height: int, width: int, size: int, overlap: int) -> None:
    pixels = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    tiling = Tiling(size, min(overlap, size - 1))
    torch.testing.assert_close(decode_tiled(IDENTITY, pixels, tiling), pixels)
    torch.testing.assert_close(encode_tiled(IDENTITY, pixels, tiling), IDENTITY.encode(pixels))


def test_blending_is_linear_over_the_overlap() -> None:
    """Tiles of constants 0 and 1 give a ramp."""
    values = iter((0.0, 1.0))
    stage = Local()
    stage.config.downsampling = 1
    stage.decode = lambda latents: torch.full_like(latents, next(values))  # type: ignore[method-assign]
    row = decode_tiled(stage, torch.zeros(1, 3, 8, 12), Tiling(8, 4))[0, 0, 3]
    assert row.tolist() == pytest.approx([0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1, 1, 1])


def test_local_networks_are_the_same_away_from_borders_of_tiles() -> None:
    """The convolutions' reach is 1 position: 3 x 3 tiles agree everywhere but within it of a tile's border."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(1, 3, 20, 20, generator=generator, dtype=torch.float64)
    stage, tiling = Local(), Tiling(8, 2)
    starts = tiling.starts(20)
    assert starts == [0, 6, 12]
    touched = {position for start in starts for position in (start, start + 7)} - {0, 19}
    clear = torch.tensor([position for position in range(20) if position not in touched])
    difference = (decode_tiled(stage, latents, tiling) - stage.decode(latents))[0, 0, ::4, ::4].abs()
    assert float(difference[clear][:, clear].max()) < 1e-6
    assert float(difference.max()) > 1e-2
    pixels = torch.rand(1, 3, 80, 80, generator=generator, dtype=torch.float64)
    difference = (encode_tiled(stage, pixels, tiling) - stage.encode(pixels))[0, 0].abs()
    assert float(difference[clear][:, clear].max()) < 1e-6


def test_an_autoencoders_tiles_are_near_the_whole() -> None:
    """Within 10 % of the pixels' deviation at 4 tiles of like statistics; normalisation within tiles is the rest."""
    torch.manual_seed(0)
    network = AutoencoderKL(AutoencoderConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8)).eval()
    latents = torch.randn(1, 4, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole, tiled = network.decode(latents), decode_tiled(network, latents, Tiling(32, 16))
        pixels = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1
        moments, tiled_moments = network.encode(pixels), encode_tiled(network, pixels, Tiling(32, 16))
    for one, other in ((whole, tiled), (moments, tiled_moments)):
        assert one.shape == other.shape
        assert 0 < float((one - other).square().mean().sqrt() / one.std()) < 0.1


def test_slices_are_the_whole(autoencoder: AutoencoderKL) -> None:
    latents = torch.randn(5, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = autoencoder.decode(latents)
        for images in (1, 2, 5, 9):
            actual = decode_in_parts(autoencoder, latents, images * 32 * 48)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decode_tiled(autoencoder, latents), expected, rtol=1e-5, atol=1e-5)
        moments = autoencoder.encode(expected)
        torch.testing.assert_close(encode_in_parts(autoencoder, expected, 32 * 48), moments, rtol=1e-5, atol=1e-5)


@given(batch=st.integers(1, 3), height=st.integers(1, 30), width=st.integers(1, 30), side=st.integers(32, 80))
@settings(max_examples=30, deadline=None)
def test_parts_stay_within_their_bound(batch: int, height: int, width: int, side: int) -> None:
    stage = Local()
    latents = torch.zeros(batch, 3, height, width)
    pixels = decode_in_parts(stage, latents, side * side)
    assert pixels.shape == (batch, 3, 4 * height, 4 * width)
    assert encode_in_parts(stage, pixels, side * side).shape == (batch, 6, height, width)
    assert stage.largest <= side * side


@pytest.mark.parametrize(("size", "overlap"), [(8, 8), (8, 9), (0, 0), (8, -1)])
def test_impossible_tiles_are_refused(size: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match=f"tile size {size}, overlap {overlap}"):
        Tiling(size, overlap)


def test_what_does_not_fit_is_refused(autoencoder: AutoencoderKL) -> None:
    with pytest.raises(InputError, match="multiples of 4"):
        encode_tiled(autoencoder, torch.zeros(1, 3, 16, 18))
    with pytest.raises(InputError, match=r"pixels are \(3, 16, 16\)"):
        encode_in_parts(autoencoder, torch.zeros(3, 16, 16), 10_000)
    with pytest.raises(InputError, match=r"latents are \(1, 3, 4, 4\)"):
        decode_tiled(autoencoder, torch.zeros(1, 3, 4, 4))
    with pytest.raises(InputError, match=r"latents are \(0, 4, 4, 4\)"):
        decode_in_parts(autoencoder, torch.zeros(0, 4, 4, 4), 10_000)
    with pytest.raises(InputError, match="max_pixels = 1023: must be 1024 or more"):
        decode_in_parts(autoencoder, torch.zeros(1, 4, 4, 4), 1023)
