"""3x3 convolutions by Winograd's minimal filtering (Lavin & Gray 2016), for inference on CPUs.

Output tiles of 4x4, F(4x4, 3x3), take 36 multiplications a pair of channels instead of 144; tiles of 2x2, F(2x2, 3x3),
16 instead of 36. They are 36 and 16 matrix products, a row for each tile: where the rows are few, reading the filters
is the work, and smaller tiles have more rows and fewer filters. Against the faster of oneDNN's direct convolution and a
product with all neighbourhoods (float32, AVX-512, two threads): 1.1 to 1.4 times as fast at 96 channels, 1.6 to 2.3
from 160 on.

The price is rounding (about 1e-5 of the largest output with tiles of 4x4, ten times that of the direct way, and 3e-6
with 2x2), and memory for the filters: 4 or 1.8 times that of the weights, 5.8 where both have been of use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ldm.convolutions import Conv3x3

LEAST_CHANNELS = 96
"""Into and out of a convolution, from which the multiplications saved outweigh the transforms."""
LEAST_TILES = 16
"""Rows of a matrix product, from which it is worth reading its filter."""
CHANNELS_A_TILE = 16
"""With fewer tiles of 4x4 than a sixteenth of the channels, filters of 2x2 are read faster, and half as large."""
TILES_AT_ONCE = 256
"""Intermediate results of so many stay in the caches of a few cores; fewer make threads wait oftener."""

SMALL_MAP = 4
"""Tiles of a feature map, up to which it is transformed whole: more multiplications, but no patches to be copied."""

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, eq=False)
class Tiling:
    """F(tile x tile, 3x3): the three matrices of Lavin & Gray (2016), section 4, B^T, G and A^T."""

    tile: int
    input: Matrix
    filter: Matrix
    output: Matrix

    @property
    def patch(self) -> int:
        """Side of what a tile is computed from."""
        return self.tile + 2

    def tiles(self, batch: int, height: int, width: int) -> int:
        """That cover feature maps of this size."""
        return batch * -(-height // self.tile) * -(-width // self.tile)


TILES_OF_4 = Tiling(
    4,
    (
        (4, 0, -5, 0, 1, 0),
        (0, -4, -4, 1, 1, 0),
        (0, 4, -4, -1, 1, 0),
        (0, -2, -1, 2, 1, 0),
        (0, 2, -1, -2, 1, 0),
        (0, 4, 0, -5, 0, 1),
    ),
    (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
    ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
)
TILES_OF_2 = Tiling(
    2,
    ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    ((1, 1, 1, 0), (0, 1, -1, -1)),
)


class WinogradConv2d(Conv3x3):
    """A 3x3 convolution of stride 1 and padding 1 with another's own parameters.

    It takes the short way for float32 on a CPU when its weight needs no gradient and there are tiles enough, and the
    usual one otherwise. Filters are made when they are first of use, and again after the weight was written to; writes
    through `.data` can't be seen: call `use_winograd` again after them.
    """

    def __init__(self, source: nn.Conv2d) -> None:
        with torch.device("meta"):
            super().__init__(source.in_channels, source.out_channels)
        assert fits(source)
        self.weight, self.bias, self.training = source.weight, source.bias, source.training
        self.filters: dict[Tiling, Tensor] = {}
        self.made_of: tuple[int, int] | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        tiling = self._tiling(x_BCHW)
        if tiling is None:
            return super().forward(x_BCHW)
        output_BHWC = convolve(x_BCHW, self._filters(tiling), tiling)
        if self.bias is not None:
            output_BHWC += self.bias
        return output_BHWC.permute(0, 3, 1, 2)

    def _tiling(self, x_BCHW: Tensor) -> Tiling | None:
        """The faster one, or None for the usual way."""
        if self.weight.requires_grad or x_BCHW.device.type != "cpu" or torch.compiler.is_compiling():
            return None
        if self.weight.is_inference():  # has no record of when it was written to
            return None
        if {x_BCHW.dtype, self.weight.dtype} != {torch.float32} or torch.is_autocast_enabled("cpu"):
            return None
        batch, channels, height, width = x_BCHW.shape
        for tiling, least in ((TILES_OF_4, max(LEAST_TILES, channels // CHANNELS_A_TILE)), (TILES_OF_2, LEAST_TILES)):
            if tiling.tiles(batch, height, width) >= least:
                return tiling
        return None

    def _filters(self, tiling: Tiling) -> Tensor:
        made_of = (self.weight.data_ptr(), self.weight._version)
        if made_of != self.made_of:
            self.filters, self.made_of = {}, made_of
        if tiling not in self.filters:
            with torch.inference_mode(False):
                self.filters[tiling] = transformed(self.weight, tiling)
        return self.filters[tiling]

    def forget(self) -> None:
        """Give back the filters' memory. They are made again when they are of use."""
        self.filters, self.made_of = {}, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"filters": {}, "made_of": None}


def fits(layer: nn.Module) -> bool:
    """Whether `WinogradConv2d` computes faster what the layer, a Conv2d or a subclass that computes it, does."""
    return (
        isinstance(layer, nn.Conv2d)
        and not isinstance(layer, WinogradConv2d)
        and (layer.kernel_size, layer.stride, layer.dilation) == ((3, 3), (1, 1), (1, 1))
        and (layer.padding, layer.groups, layer.padding_mode) == ((1, 1), 1, "zeros")
        and min(layer.in_channels, layer.out_channels) >= LEAST_CHANNELS
    )


def use_winograd(network: nn.Module) -> None:
    """Put `WinogradConv2d` in the place of all convolutions that it fits. Names and values of parameters stay. Filters
    that were made before are forgotten."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, WinogradConv2d):
                child.forget()
            if fits(child):
                assert isinstance(child, nn.Conv2d)
                setattr(parent, name, WinogradConv2d(child))


@torch.no_grad()
def transformed(weight_OI33: Tensor, tiling: Tiling) -> Tensor:
    """The filters of `convolve`, [patch², I, O]."""
    matrix = torch.tensor(tiling.filter, dtype=torch.float64, device=weight_OI33.device)
    filters = torch.einsum("ap,oipq,bq->abio", matrix, weight_OI33.double(), matrix)
    return filters.flatten(0, 1).to(weight_OI33.dtype).contiguous()


def convolve(x_BCHW: Tensor, filters: Tensor, tiling: Tiling) -> Tensor:
    """The convolution of padding 1 without bias, channels last, [B, H, W, O] (Lavin & Gray 2016, section 4)."""
    batch, _, height, width = x_BCHW.shape
    if tiling.tiles(1, height, width) <= SMALL_MAP:
        return _convolve_small(x_BCHW, filters, tiling)
    tile = tiling.tile
    down, right = -height % tile, -width % tile
    rows, columns = (height + down) // tile, (width + right) // tile
    padded_BHWC = F.pad(x_BCHW.permute(0, 2, 3, 1), (0, 0, 1, 1 + right, 1, 1 + down))
    if batch * rows * columns <= TILES_AT_ONCE:
        output = _convolve(padded_BHWC, filters, tiling)
    else:
        output = x_BCHW.new_empty(batch, rows * tile, columns * tile, filters.shape[-1])
        images, high = max(1, TILES_AT_ONCE // (rows * columns)), tile * max(1, TILES_AT_ONCE // columns)
        for first, top in product(range(0, batch, images), range(0, rows * tile, high)):
            part = padded_BHWC[first : first + images, top : top + high + 2]
            output[first : first + images, top : top + high] = _convolve(part, filters, tiling)
    return output[:, :height, :width]


def _convolve(padded_BHWC: Tensor, filters: Tensor, tiling: Tiling) -> Tensor:
    """Of feature maps that are padded to whole patches."""
    batch, height, width, channels = padded_BHWC.shape
    into, out_of = _both_axes(tiling, padded_BHWC.dtype)
    patches = (into @ _patches(padded_BHWC, tiling)).view(tiling.patch**2, -1, channels)
    return _assembled(out_of @ torch.bmm(patches, filters).flatten(1), tiling, (batch, height - 2, width - 2))


def _convolve_small(x_BCHW: Tensor, filters: Tensor, tiling: Tiling) -> Tensor:
    """Of feature maps of few tiles, each transformed by one matrix for all its tiles, padding and order included."""
    batch, channels, height, width = x_BCHW.shape
    into, out_of = _whole_map(tiling, height, width, x_BCHW.dtype)
    positions = x_BCHW.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
    patches = (into @ positions).view(-1, tiling.patch**2, channels)
    products = torch.bmm(patches.transpose(0, 1), filters).transpose(0, 1)
    return (out_of @ products.reshape(batch, -1, filters.shape[-1])).view(batch, height, width, -1)


def _patches(padded_BHWC: Tensor, tiling: Tiling) -> Tensor:
    """[patch², tiles·C]: numbers of all patches by their place in it."""
    batch, height, width, channels = padded_BHWC.shape
    tile, patch = tiling.tile, tiling.patch
    rows, columns = (height - 2) // tile, (width - 2) // tile
    image, row, column, _ = padded_BHWC.stride()
    shape, strides = (patch, patch, batch, rows, columns, channels), (row, column, image, tile * row, tile * column, 1)
    return padded_BHWC.as_strided(shape, strides).reshape(patch**2, -1)


def _assembled(tiles: Tensor, tiling: Tiling, shape: tuple[int, int, int]) -> Tensor:
    """Feature maps [B, H, W, O] of that shape, of tiles [tile², tiles·O]."""
    batch, height, width = shape
    tile = tiling.tile
    whole = tiles.view(tile, tile, batch, height // tile, width // tile, -1).permute(2, 3, 0, 4, 1, 5)
    return whole.reshape(batch, height, width, -1)


@cache
def _both_axes(tiling: Tiling, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """B^T and A^T for flattened patches: [patch², patch²] and [tile², patch²]."""
    with torch.inference_mode(False):
        into, out_of = (torch.tensor(each, dtype=dtype, device="cpu") for each in (tiling.input, tiling.output))
        return torch.kron(into, into), torch.kron(out_of, out_of)


@lru_cache(maxsize=64)
def _whole_map(tiling: Tiling, height: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The same for a map of a few tiles and its padding: [tiles·patch², H·W] and [H·W, tiles·patch²].

    Found by what the general way does to each position by itself.
    """
    with torch.inference_mode(False), torch.no_grad():
        into, out_of = _both_axes(tiling, dtype)
        tiles, patch2 = tiling.tiles(1, height, width), tiling.patch**2
        down, right = -height % tiling.tile, -width % tiling.tile
        each = torch.eye(height * width, dtype=dtype, device="cpu").view(1, height, width, -1)
        patches = into @ _patches(F.pad(each, (0, 0, 1, 1 + right, 1, 1 + down)), tiling)
        each = torch.eye(tiles * patch2, dtype=dtype, device="cpu").view(tiles, patch2, -1).transpose(0, 1).flatten(1)
        positions = _assembled(out_of @ each, tiling, (1, height + down, width + right))[0, :height, :width]
        return (
            patches.view(patch2, tiles, -1).transpose(0, 1).flatten(0, 1).contiguous(),
            positions.flatten(0, 1).contiguous(),
        )
