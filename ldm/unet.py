"""The U-Net that denoises latents under a context (Rombach et al. 2022, section 3.3), in diffusers' standard shapes.

Built by configuration: Stable Diffusion 1 and 2 are two of them. What the output means (noise, velocity, flow) is
left to `ldm.diffusion`. Parameter names are those of diffusers' UNet2DConditionModel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ldm.config import NetworkConfig, check_groups, per_block
from ldm.errors import ConfigError, InputError
from ldm.layers import (
    Checkpointed,
    Downsample2D,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2D,
    Upsample2D,
    time_embedding,
)

DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
"""Names of the down blocks, and whether they have transformers."""
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Shape of a U-Net; the names are those of diffusers' UNet2DConditionModel config.json.

    Entries of tuples are for the resolutions, from the finest. The defaults are Stable Diffusion 1's.
    """

    in_channels: int = 4
    out_channels: int = 4
    sample_size: int = 64
    """Height and width of the training latents. Says nothing about what the network accepts."""
    down_block_types: tuple[str, ...] = (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    """Residual blocks a resolution on the way down; one more on the way up."""
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    """The *number* of heads: the key has kept its historic name."""
    cross_attention_dim: int = 768
    """Width of the context."""
    use_linear_projection: bool = False
    """Projections into and out of transformers: linear layers (SD 2), or 1x1 convolutions (SD 1)."""
    upcast_attention: bool = False
    """Attention in float32, whatever the weights are."""
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    def __post_init__(self) -> None:
        blocks = len(self.block_out_channels)
        for key, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            names = getattr(self, key)
            unknown = sorted(set(names) - set(known))
            if unknown:
                raise ConfigError(f"{key} has {', '.join(unknown)}: supported are {', '.join(known)}")
            if len(names) != blocks:
                raise ConfigError(f"{key} has {len(names)} entries, block_out_channels {blocks}: give one for each")
        check_groups(self.block_out_channels, self.norm_num_groups)
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % heads:
                raise ConfigError(f"attention_head_dim = {heads} heads do not divide {channels} channels")
        per_block(self.layers_per_block, blocks, "layers_per_block")
        per_block(self.transformer_layers_per_block, blocks, "transformer_layers_per_block")
        if not isinstance(self.cross_attention_dim, int):
            raise ConfigError(
                f"cross_attention_dim = {self.cross_attention_dim}: one width for all blocks is supported"
            )

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads at each resolution."""
        return per_block(self.attention_head_dim, len(self.block_out_channels), "attention_head_dim")

    @classmethod
    def class_name(cls) -> str:
        return "UNet2DConditionModel"

    @classmethod
    def only_values(cls) -> Mapping[str, Collection[Any]]:
        return {
            "act_fn": ("silu", "swish"),
            "attention_type": ("default",),
            "center_input_sample": (False,),
            "class_embeddings_concat": (False,),
            "conv_in_kernel": (3,),
            "conv_out_kernel": (3,),
            "downsample_padding": (1,),
            "dropout": (0.0,),
            "dual_cross_attention": (False,),
            "mid_block_scale_factor": (1,),
            "mid_block_type": ("UNetMidBlock2DCrossAttn",),
            "only_cross_attention": (False,),
            "mid_block_only_cross_attention": (None, False),
            "resnet_out_scale_factor": (1.0,),
            "resnet_skip_time_act": (False,),
            "resnet_time_scale_shift": ("default",),
            "time_embedding_type": ("positional",),
        }

    @classmethod
    def without_effect(cls) -> Collection[str]:
        return ("addition_embed_type_num_heads",)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"act_fn": "silu", "mid_block_type": "UNetMidBlock2DCrossAttn"}


@dataclass(frozen=True)
class _Level:
    """What the blocks of one resolution are made with."""

    layers: int
    time_channels: int
    heads: int
    transformer_layers: int
    config: UNetConfig

    def resnet(self, in_channels: int, out_channels: int) -> ResnetBlock2D:
        return ResnetBlock2D(
            in_channels,
            out_channels,
            time_channels=self.time_channels,
            groups=self.config.norm_num_groups,
            eps=self.config.norm_eps,
        )

    def transformer(self, channels: int) -> Transformer2D:
        return Transformer2D(
            channels,
            heads=self.heads,
            layers=self.transformer_layers,
            context_width=self.config.cross_attention_dim,
            groups=self.config.norm_num_groups,
            linear_projection=self.config.use_linear_projection,
            upcast=self.config.upcast_attention,
        )


class UNet2DCondition(nn.Module):
    """The U-Net of one configuration."""

    config_class = UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        levels = self._levels(config)
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], 4 * widths[0])
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        skips = [widths[0]]
        channels = widths[0]
        for index, (level, width, name) in enumerate(zip(levels, widths, config.down_block_types, strict=True)):
            last = index == len(widths) - 1
            block = DownBlock2D(channels, width, level, attend=DOWN_BLOCKS[name], downsample=not last)
            self.down_blocks.append(block)
            skips += [width] * (level.layers + (not last))
            channels = width
        self.mid_block = MidBlock2DCrossAttn(channels, levels[-1])
        reverse = zip(levels[::-1], widths[::-1], config.up_block_types, strict=True)
        for index, (level, width, name) in enumerate(reverse):
            taken = [skips.pop() for _ in range(level.layers + 1)]
            last = index == len(widths) - 1
            self.up_blocks.append(UpBlock2D(channels, taken, width, level, attend=UP_BLOCKS[name], upsample=not last))
            channels = width
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @staticmethod
    def _levels(config: UNetConfig) -> list[_Level]:
        blocks = len(config.block_out_channels)
        each = zip(
            per_block(config.layers_per_block, blocks, "layers_per_block"),
            config.heads,
            per_block(config.transformer_layers_per_block, blocks, "transformer_layers_per_block"),
            strict=True,
        )
        time_channels = 4 * config.block_out_channels[0]
        return [
            _Level(layers, time_channels, heads, transformer_layers, config)
            for layers, heads, transformer_layers in each
        ]

    def forward(
        self, latents_BCHW: Tensor, timesteps_B: Tensor, context_BLD: Tensor, mask_BL: Tensor | None = None
    ) -> Tensor:
        """The network's prediction [B, out_channels, H, W], in the latents' dtype.

        Computes in the weights' dtype, or in autocast's. `timesteps_B` are 0 to 1000, whole or fractional. `mask_BL`
        is true where the context may be attended to; None means everywhere.

        Raises `InputError` if shapes don't fit the configuration or each other.
        """
        self._check(latents_BCHW, timesteps_B, context_BLD, mask_BL)
        config = self.config
        dtype = self.conv_in.weight.dtype
        width, flip, shift = config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift
        embedding = time_embedding(timesteps_B, width, flip_sin_to_cos=flip, freq_shift=shift)
        # Every residual block takes the activated embedding: activate it once.
        time = F.silu(self.time_embedding(embedding.to(dtype)))
        context = context_BLD.to(dtype)
        # Finite, as in diffusers: a row without any true entry attends evenly and doesn't become NaN.
        bias = None if mask_BL is None else (1 - mask_BL.to(dtype))[:, None, None, :] * -10_000.0

        hidden = self.conv_in(latents_BCHW.to(dtype).contiguous(memory_format=torch.channels_last))
        skips = [hidden]
        for block in self.down_blocks:
            hidden, passed = block(hidden, time, context, bias)
            skips += passed
        hidden = self.mid_block(hidden, time, context, bias)
        for block in self.up_blocks:
            assert isinstance(block, UpBlock2D)
            own = [skips.pop() for _ in range(block.takes)]
            hidden = block(hidden, own, time, context, bias, size=skips[-1].shape[-2:] if skips else None)
        output: Tensor = self.conv_out(F.silu(self.conv_norm_out(hidden)))
        return output.to(latents_BCHW.dtype)

    def _check(self, latents: Tensor, timesteps: Tensor, context: Tensor, mask: Tensor | None) -> None:
        if latents.ndim != 4 or latents.shape[1] != self.config.in_channels:
            raise InputError(
                f"latents are {tuple(latents.shape)}: must be [batch, {self.config.in_channels}, height, width]"
            )
        batch = latents.shape[0]
        if timesteps.shape != (batch,):
            raise InputError(f"timesteps are {tuple(timesteps.shape)}: must be one a sample, ({batch},)")
        width = self.config.cross_attention_dim
        if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != width:
            raise InputError(f"context is {tuple(context.shape)}: must be [{batch}, length, {width}]")
        if mask is not None and mask.shape != context.shape[:2]:
            raise InputError(f"mask is {tuple(mask.shape)}: must be {tuple(context.shape[:2])}, as the context")


class DownBlock2D(Checkpointed):
    """Residual blocks of one resolution, each followed by a transformer if `attend`, then a halving."""

    def __init__(self, in_channels: int, out_channels: int, level: _Level, *, attend: bool, downsample: bool) -> None:
        super().__init__()
        inputs = (in_channels, *(out_channels,) * (level.layers - 1))
        self.resnets = nn.ModuleList(level.resnet(channels, out_channels) for channels in inputs)
        if attend:
            self.attentions = nn.ModuleList(level.transformer(out_channels) for _ in inputs)
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
    """A transformer between two residual blocks, at the coarsest resolution."""

    def __init__(self, channels: int, level: _Level) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(level.resnet(channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([level.transformer(channels)])

    def forward(self, hidden: Tensor, time: Tensor, context: Tensor, bias: Tensor | None) -> Tensor:
        hidden = self.run(self.resnets[0], hidden, time)
        hidden = self.run(self.attentions[0], hidden, context, bias)
        return self.run(self.resnets[1], hidden, time)


class UpBlock2D(Checkpointed):
    """Residual blocks that each take in a skip connection, a transformer after each if `attend`, then a doubling."""

    def __init__(
        self, in_channels: int, skips: list[int], out_channels: int, level: _Level, *, attend: bool, upsample: bool
    ) -> None:
        super().__init__()
        inputs = (in_channels, *(out_channels,) * (len(skips) - 1))
        self.resnets = nn.ModuleList(
            level.resnet(channels + skip, out_channels) for channels, skip in zip(inputs, skips, strict=True)
        )
        if attend:
            self.attentions = nn.ModuleList(level.transformer(out_channels) for _ in inputs)
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
