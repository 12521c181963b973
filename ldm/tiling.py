"""Encoding and decoding in parts of bounded memory: one image after another, and overlapping tiles blended linearly.

A tile is normalised and attends within itself: group normalisation and the middle attention take their statistics from
the tile rather than the image, so a tiled result differs from the whole one everywhere, a little, where tiles differ in
contrast or colour. What the convolutions compute is the same beyond their reach of a tile's border (in the standard
shape about 10 latent positions), where the border's zero padding is seen instead of the neighbour; an overlap of that
size leaves such positions little weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.errors import ConfigError, InputError
from ldm.latents import LatentScale

SMALLEST_TILE = 8
"""Latent positions a side, below which `decode_in_parts` refuses rather than decode scraps."""


class FirstStageConfig(LatentScale, Protocol):
    """What all that use a first stage need to know of it."""

    @property
    def in_channels(self) -> int: ...
    @property
    def out_channels(self) -> int: ...
    @property
    def latent_channels(self) -> int: ...
    @property
    def downsampling(self) -> int: ...


class FirstStage(Protocol):
    """`AutoencoderKL` or `IdentityAutoencoder`."""

    @property
    def config(self) -> FirstStageConfig: ...
    def encode(self, pixels_BCHW: Tensor) -> Tensor: ...
    def decode(self, latents_BCHW: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Tiling:
    """Square tiles, in latent positions a side. Neighbours overlap by at least `overlap`, and by about the same."""

    size: int = 64
    overlap: int = 16

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 <= self.overlap < self.size:
            raise ConfigError(
                f"tile size {self.size}, overlap {self.overlap}: the size must be at least 1, the overlap less than it"
            )

    def starts(self, length: int) -> list[int]:
        """Where tiles begin along a side of `length` positions, from 0 to the last that fits; [0] if one covers it."""
        if length <= self.size:
            return [0]
        gaps = math.ceil((length - self.size) / (self.size - self.overlap))
        return [round(index * (length - self.size) / gaps) for index in range(gaps + 1)]


def encode_tiled(autoencoder: FirstStage, pixels_BCHW: Tensor, tiling: Tiling | None = None) -> Tensor:
    """Moments [B, 2C, H/f, W/f] of tiles encoded one at a time: means and log-variances are blended alike.

    Equal to `encode` where one tile covers the image; see the module for the difference elsewhere. Raises `InputError`
    for pixels that `encode` refuses.
    """
    factor = autoencoder.config.downsampling
    _check(pixels_BCHW, autoencoder.config.in_channels, factor, "pixels")
    return _tiled(autoencoder.encode, pixels_BCHW, tiling or Tiling(), stride_in=factor, stride_out=1)


def decode_tiled(autoencoder: FirstStage, latents_BCHW: Tensor, tiling: Tiling | None = None) -> Tensor:
    """Pixels [B, out_channels, f·h, f·w] of tiles of unscaled latents, decoded one at a time and blended.

    Equal to `decode` where one tile covers the latents; see the module for the difference elsewhere. Raises
    `InputError` for latents that `decode` refuses.
    """
    _check(latents_BCHW, autoencoder.config.latent_channels, 1, "latents")
    factor = autoencoder.config.downsampling
    return _tiled(autoencoder.decode, latents_BCHW, tiling or Tiling(), stride_in=1, stride_out=factor)


def encode_in_parts(autoencoder: FirstStage, pixels_BCHW: Tensor, max_pixels: int) -> Tensor:
    """`encode`, at most `max_pixels` pixels at a time: as many images as that allows, or tiles of one.

    Raises `InputError` as `encode` does, or if `max_pixels` is less than a tile of 8x8 latent positions.
    """
    factor = autoencoder.config.downsampling
    _check(pixels_BCHW, autoencoder.config.in_channels, factor, "pixels")
    return _in_parts(autoencoder.encode, encode_tiled, autoencoder, pixels_BCHW, max_pixels, stride_in=factor)


def decode_in_parts(autoencoder: FirstStage, latents_BCHW: Tensor, max_pixels: int) -> Tensor:
    """`decode`, at most `max_pixels` pixels at a time: as many images as that allows, or tiles of one.

    Raises `InputError` as `decode` does, or if `max_pixels` is less than a tile of 8x8 latent positions.
    """
    _check(latents_BCHW, autoencoder.config.latent_channels, 1, "latents")
    return _in_parts(autoencoder.decode, decode_tiled, autoencoder, latents_BCHW, max_pixels, stride_in=1)


def largest_tile(autoencoder: FirstStage, max_pixels: int) -> int:
    """Latent positions a side of a square tile of at most `max_pixels` pixels.

    Raises `InputError` if that is less than 8.
    """
    factor = autoencoder.config.downsampling
    tile = math.isqrt(max(max_pixels, 0)) // factor
    if tile < SMALLEST_TILE:
        least = (SMALLEST_TILE * factor) ** 2
        raise InputError(f"max_pixels = {max_pixels}: must be {least} or more, {SMALLEST_TILE} latent positions a side")
    return tile


def _in_parts(
    whole: Callable[[Tensor], Tensor],
    tiled: Callable[[FirstStage, Tensor, Tiling], Tensor],
    autoencoder: FirstStage,
    x_BCHW: Tensor,
    max_pixels: int,
    *,
    stride_in: int,
) -> Tensor:
    factor = autoencoder.config.downsampling
    tile = largest_tile(autoencoder, max_pixels)
    an_image = x_BCHW[0, 0].numel() * (factor // stride_in) ** 2
    if an_image > max_pixels:
        return tiled(autoencoder, x_BCHW, Tiling(tile, tile // 4))
    return torch.cat([whole(part) for part in torch.split(x_BCHW, max_pixels // an_image)])


def _tiled(
    function: Callable[[Tensor], Tensor], x_BCHW: Tensor, tiling: Tiling, *, stride_in: int, stride_out: int
) -> Tensor:
    """`function` over tiles, one image at a time. A latent position is `stride_in` samples of the input a side, and
    `stride_out` of the output."""
    height, width = (side // stride_in for side in x_BCHW.shape[-2:])
    if height <= tiling.size and width <= tiling.size:
        return torch.cat([function(image) for image in torch.split(x_BCHW, 1)])
    rows, columns = (_along(length, tiling, stride_out, x_BCHW.device) for length in (height, width))
    output: Tensor | None = None
    for index, image in enumerate(torch.split(x_BCHW, 1)):
        for top, tall, weight_H in rows:
            for left, wide, weight_W in columns:
                vertical = slice(top * stride_in, (top + tall) * stride_in)
                tile = function(image[..., vertical, left * stride_in : (left + wide) * stride_in])
                if output is None:
                    shape = (len(x_BCHW), tile.shape[1], height * stride_out, width * stride_out)
                    output = torch.zeros(shape, dtype=torch.float32, device=tile.device)
                vertical = slice(top * stride_out, (top + tall) * stride_out)
                horizontal = slice(left * stride_out, (left + wide) * stride_out)
                output[index, :, vertical, horizontal] += tile[0] * weight_H[:, None] * weight_W
    assert output is not None
    return output.to(x_BCHW.dtype)


def _along(length: int, tiling: Tiling, stride: int, device: torch.device) -> list[tuple[int, int, Tensor]]:
    """Start and size of each tile along a side, in latent positions, and the float32 weights of its output samples.

    They rise and fall linearly over the overlap, and add up to 1 at every sample.
    """
    size = min(tiling.size, length)
    from_border = torch.arange(size * stride, device=device) + 0.5
    ramp = torch.minimum(from_border, from_border.flip(0)).clamp(max=max(tiling.overlap * stride, 1))
    total = torch.zeros(length * stride, device=device)
    starts = tiling.starts(length)
    for start in starts:
        total[start * stride : (start + size) * stride] += ramp
    return [(start, size, ramp / total[start * stride : (start + size) * stride]) for start in starts]


def _check(x_BCHW: Tensor, channels: int, factor: int, name: str) -> None:
    shape = tuple(x_BCHW.shape)
    if x_BCHW.ndim != 4 or shape[1] != channels or 0 in shape:
        raise InputError(f"{name} are {shape}: must be [batch, {channels}, height, width], none of them empty")
    if shape[2] % factor or shape[3] % factor:
        raise InputError(f"{name} are {shape}: height and width must be multiples of {factor}")
