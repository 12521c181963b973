"""Layers that the U-Net and the autoencoder share. Parameter names are those of diffusers.

Shape suffixes: B batch, C channels, H height, W width, L length of the context, N positions, D width of a position.

Feature maps travel in channels_last memory; weights stay contiguous, as sharded optimizers want them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.convolutions import Conv1x1, Conv3x3

PLAIN_ATTENTION_SCORES = 64 * 1024
"""Number of scores a head up to which softmax of a matrix product beats the fused kernel on CPUs (by 3 to 10 times when
sequences are tiny); beyond it, the fused kernel's smaller memory wins."""


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, upcast: bool = False) -> Tensor:
    """Softmax attention (Vaswani et al. 2017, eq. 1), by the fastest way for the device and the length.

    `q` [B, heads, N, D], `k` and `v` [B, heads, L, D], `bias` broadcastable to [B, heads, N, L], added to the scores.
    Returns [B, heads, N, D]. With `upcast`, scores are never rounded to a dtype below float32: the fused kernels keep
    them in float32 themselves, whatever the inputs are.
    """
    rounds = upcast and q.dtype != torch.float32
    if q.device.type == "cpu" and q.shape[-2] * k.shape[-2] <= PLAIN_ATTENTION_SCORES and not rounds:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        mixed: Tensor = scores.softmax(dim=-1) @ v
        return mixed
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def time_embedding(timesteps_B: Tensor, width: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0) -> Tensor:
    """Sinusoidal embedding of times (Ho et al. 2020; Vaswani et al. 2017, section 3.5), float32 [B, width].

    `timesteps_B` may be fractional. With `flip_sin_to_cos` cosines come first.
    """
    half = width // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=timesteps_B.device)
    angles = timesteps_B.float()[:, None] * torch.exp(exponent / (half - freq_shift))[None]
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, width % 2))


class Checkpointed(nn.Module):
    """A module whose parts may trade computation for memory: activations are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    def run(self, part: nn.Module, *inputs: Any) -> Tensor:
        """`part(*inputs)`, checkpointed if that is on and gradients are wanted."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            output = checkpoint(part, *inputs, use_reentrant=False)
        else:
            output = part(*inputs)
        assert isinstance(output, Tensor)
        return output


def set_gradient_checkpointing(network: nn.Module, on: bool) -> None:
    """Switch checkpointing of residual blocks and transformers in the whole network."""
    for module in network.modules():
        if isinstance(module, Checkpointed):
            module.gradient_checkpointing = on


class TimestepEmbedding(nn.Module):
    """Two linear layers over the sinusoidal embedding: [B, width] to [B, out]."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, out)
        self.linear_2 = nn.Linear(out, out)

    def forward(self, embedding: Tensor) -> Tensor:
        output: Tensor = self.linear_2(F.silu(self.linear_1(embedding)))
        return output


class ResnetBlock2D(nn.Module):
    """Two normalised 3x3 convolutions around a residual connection, with the time added between them.

    `time` is the time embedding after its activation [B, D], or None where the block has none.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, time_channels: int | None, groups: int, eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(time_channels, out_channels) if time_channels is not None else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = Conv3x3(out_channels, out_channels)
        self.conv_shortcut = Conv1x1(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x_BCHW: Tensor, time: Tensor | None = None) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x_BCHW)))
        if self.time_emb_proj is not None:
            hidden = hidden + self.time_emb_proj(time)[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        shortcut = x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW)
        output: Tensor = shortcut + hidden
        return output


class Downsample2D(nn.Module):
    """Halves height and width by a strided 3x3 convolution.

    The autoencoder pads right and bottom only (`padding=0`), the U-Net all sides (`padding=1`).
    """

    def __init__(self, channels: int, *, padding: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels, stride=2, padding=padding)
        self.pads_itself = padding == 0

    def forward(self, x_BCHW: Tensor) -> Tensor:
        output: Tensor = self.conv(F.pad(x_BCHW, (0, 1, 0, 1)) if self.pads_itself else x_BCHW)
        return output


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling to `size` (twice the size if None), then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x_BCHW: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        output: Tensor = self.conv(F.interpolate(x_BCHW, size=size or (2 * height, 2 * width), mode="nearest"))
        return output


class MultiHeadAttention(nn.Module):
    """The projections of attention; subclasses say between what."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_width: int,
        context_width: int | None = None,
        qkv_bias: bool = False,
        upcast: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.upcast = upcast
        self.to_q = nn.Linear(width, inner, bias=qkv_bias)
        self.to_k = nn.Linear(context_width or width, inner, bias=qkv_bias)
        self.to_v = nn.Linear(context_width or width, inner, bias=qkv_bias)
        # A sequence of one: the parameters are called to_out.0.* in saved weights.
        self.to_out = nn.Sequential(nn.Linear(inner, width))

    def attend(self, x_BND: Tensor, source_BLD: Tensor, bias: Tensor | None = None) -> Tensor:
        """What the positions of `x` read at the positions of `source`, [B, N, width]."""
        source_BLD = source_BLD.to(x_BND.dtype)
        q, k, v = (self._split(part) for part in (self.to_q(x_BND), self.to_k(source_BLD), self.to_v(source_BLD)))
        mixed = attention(q, k, v, bias, upcast=self.upcast)
        output: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return output

    def _split(self, x_BND: Tensor) -> Tensor:
        batch, positions, _ = x_BND.shape
        return x_BND.view(batch, positions, self.heads, -1).transpose(1, 2)


class Attention(MultiHeadAttention):
    """Attention of a sequence [B, N, width] to itself, or to a context [B, L, context_width]."""

    def forward(self, x_BND: Tensor, context_BLD: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return self.attend(x_BND, x_BND if context_BLD is None else context_BLD, bias)


class SpatialAttention(MultiHeadAttention):
    """Single-head attention among the positions of a feature map, with normalisation and residual connection."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, heads=1, head_width=channels, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        positions_BND = to_positions(self.group_norm(x_BCHW))
        return x_BCHW + to_map(self.attend(positions_BND, positions_BND), x_BCHW)


class GEGLU(nn.Module):
    """Gated linear unit with a GELU gate (Shazeer 2020)."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * out)

    def forward(self, x_BND: Tensor) -> Tensor:
        value, gate = self.proj(x_BND).chunk(2, dim=-1)
        output: Tensor = value * F.gelu(gate)
        return output


class FeedForward(nn.Module):
    """The transformer's two-layer perceptron, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # The middle entry has no parameters (dropout in diffusers): it keeps the name net.2 for the last layer.
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x_BND: Tensor) -> Tensor:
        output: Tensor = self.net(x_BND)
        return output


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward: each normalised first and added.

    With `only_cross_attention`, the first attention reads the context as well (SD x4 upscaler).
    """

    def __init__(
        self, width: int, *, heads: int, context_width: int, upcast: bool, only_cross_attention: bool = False
    ) -> None:
        super().__init__()
        head_width = width // heads
        own = context_width if only_cross_attention else None
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, heads=heads, head_width=head_width, context_width=own, upcast=upcast)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, heads=heads, head_width=head_width, context_width=context_width, upcast=upcast)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(width)

    def forward(self, x_BND: Tensor, context_BLD: Tensor, bias: Tensor | None) -> Tensor:
        first = (context_BLD, bias) if self.only_cross_attention else ()
        x_BND = x_BND + self.attn1(self.norm1(x_BND), *first)
        x_BND = x_BND + self.attn2(self.norm2(x_BND), context_BLD, bias)
        output: Tensor = x_BND + self.ff(self.norm3(x_BND))
        return output


class Transformer2D(nn.Module):
    """Transformer blocks over the positions of a feature map [B, C, H, W] (Rombach et al. 2022, section 3.3)."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        layers: int,
        context_width: int,
        groups: int,
        linear_projection: bool,
        upcast: bool,
        only_cross_attention: bool = False,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        inner = heads * (channels // heads)
        self.proj_in = nn.Linear(channels, inner) if linear_projection else Conv1x1(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                inner,
                heads=heads,
                context_width=context_width,
                upcast=upcast,
                only_cross_attention=only_cross_attention,
            )
            for _ in range(layers)
        )
        self.proj_out = nn.Linear(inner, channels) if linear_projection else Conv1x1(inner, channels)

    def forward(self, x_BCHW: Tensor, context_BLD: Tensor, bias: Tensor | None) -> Tensor:
        linear = self.linear_projection
        hidden = self.norm(x_BCHW)
        hidden = self.proj_in(to_positions(hidden)) if linear else to_positions(self.proj_in(hidden))
        for block in self.transformer_blocks:
            hidden = block(hidden, context_BLD, bias)
        hidden = to_map(self.proj_out(hidden), x_BCHW) if linear else self.proj_out(to_map(hidden, x_BCHW))
        return x_BCHW + hidden


def to_positions(x_BCHW: Tensor) -> Tensor:
    """A feature map as a sequence of positions [B, H·W, C]: a view where memory is channels_last."""
    return x_BCHW.flatten(2).transpose(1, 2)


def to_map(x_BND: Tensor, like_BCHW: Tensor) -> Tensor:
    """The sequence as a feature map with the height and width of `like_BCHW`, channels_last in memory."""
    height, width = like_BCHW.shape[-2:]
    return x_BND.transpose(1, 2).view(len(x_BND), -1, height, width)
