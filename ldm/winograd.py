"""3x3 convolutions by Winograd's minimal filtering, F(4x4, 3x3) of Lavin & Gray (2016), for inference on CPUs.

An output tile of 4x4 takes 36 multiplications a pair of channels instead of 144. Measured against oneDNN's direct
convolution (float32, AVX-512, one thread): 1.5 times as fast at 128 channels, 2.1 at 256, 2.7 at 512, no gain at 64.
The price is rounding: about 1e-5 of the largest output, ten times that of the direct way.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

TILE, PATCH = 4, 6
LEAST_CHANNELS = 128
"""Into and out of a convolution, from which the multiplications saved outweigh the transforms."""
TILES_AT_ONCE = 512
"""Intermediate results of so many stay in the caches of a few cores; fewer make threads wait oftener."""

INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
FILTER = ((6, 0, 0), (-4, -4, -4), (-4, 4, -4), (1, 2, 4), (1, -2, 4), (0, 0, 24))
"""Of 24ths."""
OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


class WinogradConv2d(nn.Conv2d):
    """A 3x3 convolution of stride 1 and padding 1 with another's own parameters.

    It takes the short way for float32 on a CPU when its weight needs no gradient, and the usual one otherwise.
    """

    def __init__(self, source: nn.Conv2d) -> None:
        with torch.device("meta"):
            super().__init__(source.in_channels, source.out_channels, 3, padding=1)
        assert fits(source)
        self.weight, self.bias = source.weight, source.bias
        self.filters: Tensor | None = None
        self.made_of: tuple[int, int] | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        usual = self.weight.requires_grad or x_BCHW.device.type != "cpu"
        if usual or x_BCHW.dtype != torch.float32 or self.weight.dtype != torch.float32:
            return super().forward(x_BCHW)
        output_BHWC = convolve(x_BCHW, self._filters())
        if self.bias is not None:
            output_BHWC += self.bias
        return output_BHWC.permute(0, 3, 1, 2)

    def _filters(self) -> Tensor:
        """Made once, and again when the weight was written to."""
        made_of = (self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version)
        if self.filters is None or made_of != self.made_of:
            self.filters, self.made_of = transformed(self.weight), made_of
        return self.filters


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
    """Put `WinogradConv2d` in the place of all convolutions that it fits. Names and values of parameters stay."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if fits(child):
                assert isinstance(child, nn.Conv2d)
                setattr(parent, name, WinogradConv2d(child))


@torch.no_grad()
def transformed(weight_OI33: Tensor) -> Tensor:
    """The filters of `convolve`, [36, I, O]."""
    matrix = torch.tensor(FILTER, dtype=torch.float64) / 24
    filters = torch.einsum("ap,oipq,bq->abio", matrix, weight_OI33.double(), matrix)
    return filters.flatten(0, 1).to(weight_OI33.dtype).contiguous()


def convolve(x_BCHW: Tensor, filters: Tensor) -> Tensor:
    """The convolution of padding 1 without bias, channels last, [B, H, W, O] (Lavin & Gray 2016, section 4)."""
    batch, channels, height, width = x_BCHW.shape
    down, right = -height % TILE, -width % TILE
    rows, columns = (height + down) // TILE, (width + right) // TILE
    into, out_of = (torch.tensor(matrix, dtype=x_BCHW.dtype) for matrix in (INPUT, OUTPUT))
    into, out_of = torch.kron(into, into), torch.kron(out_of, out_of)
    padded_BHWC = F.pad(x_BCHW, (1, 1 + right, 1, 1 + down)).permute(0, 2, 3, 1)
    patches = padded_BHWC.unfold(1, PATCH, TILE).unfold(2, PATCH, TILE).permute(4, 5, 0, 1, 2, 3)
    output = x_BCHW.new_empty(batch, rows, TILE, columns, TILE, filters.shape[-1])
    images, high = max(1, TILES_AT_ONCE // (rows * columns)), max(1, TILES_AT_ONCE // columns)
    for first, top in product(range(0, batch, images), range(0, rows, high)):
        at = (slice(first, first + images), slice(top, top + high))
        part = patches[:, :, *at]
        products = (into @ part.reshape(PATCH**2, -1)).view(PATCH**2, -1, channels) @ filters
        tiles = (out_of @ products.flatten(1)).view(TILE, TILE, *part.shape[2:5], -1)
        output[at] = tiles.permute(2, 3, 0, 4, 1, 5)
    return output.view(batch, rows * TILE, columns * TILE, -1)[:, :height, :width]
