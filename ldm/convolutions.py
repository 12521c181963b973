"""The two convolutions that the networks are made of, by the fastest way for device and shape.

Shape suffixes: B batch, C channels, H height, W width. Feature maps are expected in channels_last memory, and are
returned in it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Conv3x3(nn.Conv2d):
    """A convolution of 3x3 neighbourhoods, by the fastest way for the device and the shape."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, padding: int = 1) -> None:
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=padding)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, channels, height, width = x_BCHW.shape
        positions = batch * (height // self.stride[0]) * (width // self.stride[1])
        if x_BCHW.device.type == "cpu" and positions <= channels:
            return self._as_matrix_product(x_BCHW)
        return super().forward(x_BCHW)

    def _as_matrix_product(self, x_BCHW: Tensor) -> Tensor:
        """The same by one matrix product with all neighbourhoods.

        Where there are fewer positions than channels, oneDNN's convolution spends its time on laying out the weights:
        this takes 1/1.3 to 1/2.5 of its time, forward and backward.
        """
        pad, step = int(self.padding[0]), self.stride[0]
        padded_BHWC = F.pad(x_BCHW.permute(0, 2, 3, 1), (0, 0, pad, pad, pad, pad))
        height, width = ((size - 3) // step + 1 for size in padded_BHWC.shape[1:3])
        shifted = [
            padded_BHWC[:, row : row + step * (height - 1) + 1 : step, column : column + step * (width - 1) + 1 : step]
            for row in range(3)
            for column in range(3)
        ]
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(torch.cat(shifted, dim=-1), weight, self.bias).permute(0, 3, 1, 2)


class Conv1x1(nn.Conv2d):
    """A linear layer on every position: a matrix product without copies where memory is channels_last."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.linear(x_BCHW.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)
