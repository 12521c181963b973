"""The U-Net's blocks: residual blocks and transformers of one resolution, and the way to the next.

Parameter names are those of diffusers. Which blocks make a U-Net is said in `ldm.unet`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.layers import (
    Checkpointed,
    Downsample2D,
    ResnetBlock2D,
    Transformer2D,
    Upsample2D,
)


@dataclass(frozen=True)
class Level:
    """What the blocks of one resolution are made with."""

    layers: int
    time_channels: int
    heads: int
    transformer_layers: int
    only_cross_attention: bool
    context_width: int
    linear_projection: bool
    upcast: bool
    groups: int
    eps: float

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock2D:
        return ResnetBlock2D(
            in_channels, out_channels, time_channels=self.time_channels, groups=self.groups, eps=self.eps
        )

    def transformer(self, channels: int, *, only_cross_attention: bool) -> Transformer2D:
        return Transformer2D(
            channels,
            heads=self.heads,
            layers=self.transformer_layers,
            context_width=self.context_width,
            groups=self.groups,
            linear_projection=self.linear_projection,
            upcast=self.upcast,
            only_cross_attention=only_cross_attention,
        )


class DownBlock2D(Checkpointed):
    """Residual blocks of one resolution, each followed by a transformer if `attend`, then a halving."""

    def __init__(self, in_channels: int, out_channels: int, level: Level, *, attend: bool, downsample: bool) -> None:
        super().__init__()
        inputs = (in_channels, *(out_channels,) * (level.layers - 1))
        self.resnets = nn.ModuleList(level.resnet(channels, out_channels) for channels in inputs)
        if attend:
            only = level.only_cross_attention
            self.attentions = nn.ModuleList(level.transformer(out_channels, only_cross_attention=only) for _ in inputs)
        self.attend = attend
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=1)] if downsample else [])

    def forward(
        self, hidden: Tensor, time: Tensor, context: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, list[Tensor]]:
        passed = []
        for index, resnet in enumerate(self.resnets):
            hidden = self.run(resnet, hidden, time)
            if self.attend:
                hidden = self.run(self.attentions[index], hidden, context, bias)
            passed.append(hidden)
        for downsampler in self.downsamplers:
            hidden = downsampler(hidden)
            passed.append(hidden)
        return hidden, passed


class MidBlock2DCrossAttn(Checkpointed):
    """A transformer between two residual blocks, at the coarsest resolution. It always attends to itself too."""

    def __init__(self, channels: int, level: Level) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(level.resnet(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([level.transformer(channels, only_cross_attention=False)])

    def forward(self, hidden: Tensor, time: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        hidden = self.run(self.resnets[0], hidden, time)
        hidden = self.run(self.attentions[0], hidden, context, bias)
        return self.run(self.resnets[1], hidden, time)


class UpBlock2D(Checkpointed):
    """Residual blocks that each take in a skip connection, a transformer after each if `attend`, then a doubling."""

    def __init__(
        self, in_channels: int, skips: list[int], out_channels: int, level: Level, *, attend: bool, upsample: bool
    ) -> None:
        super().__init__()
        inputs = (in_channels, *(out_channels,) * (len(skips) - 1))
        self.resnets = nn.ModuleList(
            level.resnet(channels + skip, out_channels) for channels, skip in zip(inputs, skips, strict=True)
        )
        if attend:
            only = level.only_cross_attention
            self.attentions = nn.ModuleList(level.transformer(out_channels, only_cross_attention=only) for _ in inputs)
        self.attend = attend
        self.takes = len(skips)
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsample else [])

    def forward(
        self,
        hidden: Tensor,
        skips: list[Tensor],
        time: Tensor,
        context: Tensor,
        bias: Tensor | None,
        size: tuple[int, int] | None,
    ) -> Tensor:
        for index, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            hidden = self.run(resnet, torch.cat([hidden, skip], dim=1), time)
            if self.attend:
                hidden = self.run(self.attentions[index], hidden, context, bias)
        for upsampler in self.upsamplers:
            hidden = upsampler(hidden, size)
        return hidden
