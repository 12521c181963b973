"""The patch discriminator of the autoencoder's adversarial training (Isola et al. 2017, section 3.2.2).

It judges overlapping patches of an image rather than the whole. Its losses are in `ldm.losses`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError, InputError

KERNEL = 4
SLOPE = 0.2
GROUPS = 32


class PatchDiscriminator(nn.Module):
    """Convolutions that halve the image `layers` times, then two at that resolution: one logit a patch.

    With the usual 3 layers a patch is 70x70 pixels (Isola et al. 2017, section 6.1.2). Real is above 0.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        width: int = 64,
        layers: int = 3,
        norm: Literal["batch", "group"] = "batch",
        generator: torch.Generator | None = None,
    ) -> None:
        """`norm` is batch normalisation as in the paper, or group normalisation, with which an image's logits do not
        depend on its batch. Weights are drawn from N(0, 0.02) with `generator` (Isola et al. 2017, section 6.2).

        Raises `ConfigError` if there are no layers, or groups of 32 (or `width`, if that is less) don't fit.
        """
        super().__init__()
        groups = min(GROUPS, width)
        if layers < 1 or width < 1 or (norm == "group" and width % groups):
            raise ConfigError(
                f"width = {width}, layers = {layers}: must be 1 or more, the width a multiple of {groups}"
            )
        self.in_channels = in_channels
        self.layers = layers
        widths = [width * min(2**index, 8) for index in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(in_channels, width, KERNEL, stride=2, padding=1), nn.LeakyReLU(SLOPE)]
        for index in range(1, layers + 1):
            stride = 2 if index < layers else 1
            after = widths[index]
            parts += [
                # The normalisation after it has a bias.
                nn.Conv2d(widths[index - 1], after, KERNEL, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(after) if norm == "batch" else nn.GroupNorm(groups, after),
                nn.LeakyReLU(SLOPE),
            ]
        self.main = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, KERNEL, padding=1))
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02, generator=generator)
            elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.normal_(module.weight, 1.0, 0.02, generator=generator)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits [B, 1, H', W'], H' = H / 2^layers − 2 rounded down, of pixels in [-1, 1].

        Raises `InputError` if the pixels have another number of channels, or are too small for one patch.
        """
        least = 3 * 2**self.layers
        if pixels_BCHW.ndim != 4 or pixels_BCHW.shape[1] != self.in_channels or min(pixels_BCHW.shape[-2:]) < least:
            raise InputError(
                f"pixels are {tuple(pixels_BCHW.shape)}: must be [batch, {self.in_channels}, height, width], sides of"
                f" {least} or more"
            )
        logits: Tensor = self.main(pixels_BCHW)
        return logits
