"""The first stage: a KL-regularised autoencoder (Rombach et al. 2022, section 3.1), in AutoencoderKL's standard shape,
or none, for diffusion of pixels.

It maps pixels to the moments of a Gaussian posterior and latents back to pixels. Sampling the posterior and scaling
latents is left to `ldm.latents`, losses to `ldm.losses`, large images to `ldm.tiling`. Parameter names are those of
diffusers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ldm.config import MOST_LAYERS, NetworkConfig, check_blocks, check_groups, check_positive
from ldm.errors import ConfigError, InputError
from ldm.latents import LOG_VARIANCE_RANGE, posterior_mean, sample_posterior
from ldm.layers import Checkpointed, Downsample2D, ResnetBlock2D, SpatialAttention, Upsample2D

EPS = 1e-6


@dataclass(frozen=True)
class AutoencoderConfig(NetworkConfig):
    """Shape of an autoencoder; the names are those of diffusers' AutoencoderKL config.json."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels at each resolution, from the finest; each further entry halves height and width."""
    layers_per_block: int = 2
    """Residual blocks a resolution in the encoder; the decoder has one more."""
    latent_channels: int = 4
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    scaling_factor: float = 0.18215
    """Latents are multiplied by this for the diffusion: 1 / their standard deviation."""
    shift_factor: float | None = None
    """Subtracted from latents before they are scaled."""
    latents_mean: tuple[float, ...] | None = None
    """Mean of each latent channel, which is subtracted too; it goes with `latents_std`. None leaves both out."""
    latents_std: tuple[float, ...] | None = None
    """Standard deviation of each latent channel, by which latents are divided too; it goes with `latents_mean`."""
    sample_size: int = 256
    """Height and width of the training images in pixels. Says nothing about what the network accepts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks(self.block_out_channels)
        check_positive(self, ("in_channels", "out_channels", "block_out_channels", "latent_channels"))
        check_positive(self, ("norm_num_groups", "sample_size"))
        check_positive(self, ("layers_per_block",), MOST_LAYERS)
        check_groups(self.block_out_channels, self.norm_num_groups)
        lengths = [None if given is None else len(given) for given in (self.latents_mean, self.latents_std)]
        if lengths not in ([None, None], [self.latent_channels] * 2):
            raise ConfigError(
                f"latents_mean and latents_std have {lengths[0]} and {lengths[1]} entries: give neither, or both, one"
                f" for each of the {self.latent_channels} channels"
            )
        if self.scaling_factor <= 0:
            raise ConfigError(f"scaling_factor = {self.scaling_factor}: must be above zero")
        if self.latents_std is not None and min(self.latents_std) <= 0:
            raise ConfigError(f"latents_std = {list(self.latents_std)}: must be of numbers above zero")

    @property
    def downsampling(self) -> int:
        """Pixels a side that one latent position stands for."""
        return 1 << (len(self.block_out_channels) - 1)

    @classmethod
    def class_name(cls) -> str:
        return "AutoencoderKL"

    @classmethod
    def only_values(cls) -> Mapping[str, Collection[Any]]:
        # Read where a dtype is chosen for the whole folder.
        return {"act_fn": ("silu", "swish"), "force_upcast": (True, False)}

    @classmethod
    def without_effect(cls) -> Collection[str]:
        return ("down_block_types", "dropout", "up_block_types")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AutoencoderConfig:
        config = super().from_dict(values)
        for key, block in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            expected = [block] * len(config.block_out_channels)
            found = values.get(key, expected)
            if not isinstance(found, list | tuple) or list(found) != expected:
                raise ConfigError(f"AutoencoderKL: {key} = {found!r}: must be {block} for each resolution")
        return config

    def to_dict(self) -> dict[str, Any]:
        blocks = len(self.block_out_channels)
        return super().to_dict() | {
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * blocks,
            "up_block_types": ["UpDecoderBlock2D"] * blocks,
        }


class AutoencoderKL(nn.Module):
    """The autoencoder of one configuration. Pixels are in [-1, 1]; height and width are multiples of `downsampling`."""

    config_class = AutoencoderConfig

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """The posterior's moments [B, 2·latent_channels, H/f, W/f]: mean, then log-variance, in the pixels' dtype.

        Raises `InputError` if the pixels are not [B, in_channels, H, W] with H and W multiples of `downsampling`.
        """
        factor = self.config.downsampling
        _check_map(pixels_BCHW, self.config.in_channels, "pixels")
        if pixels_BCHW.shape[-2] % factor or pixels_BCHW.shape[-1] % factor:
            raise InputError(f"pixels are {tuple(pixels_BCHW.shape)}: height and width must be multiples of {factor}")
        moments: Tensor = self.encoder(_entering(pixels_BCHW, self.encoder.conv_in))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return moments.to(pixels_BCHW.dtype)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """Pixels, about [-1, 1], [B, out_channels, f·h, f·w] of unscaled latents, in the latents' dtype.

        Raises `InputError` if the latents are not [B, latent_channels, h, w].
        """
        _check_map(latents_BCHW, self.config.latent_channels, "latents")
        hidden = _entering(latents_BCHW, self.decoder.conv_in)
        if self.post_quant_conv is not None:
            hidden = self.post_quant_conv(hidden)
        pixels: Tensor = self.decoder(hidden)
        return pixels.to(latents_BCHW.dtype)

    def for_inference(self) -> Self:
        """Make the network fast to run, in place, and return it: evaluation mode, no gradients, weights in the memory
        format of the feature maps. Its state stays the same. Not for training: sharded optimizers want contiguous
        weights."""
        return self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, pixels_BCHW: Tensor, noise_BCHW: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode, draw from the posterior with the given standard normal noise (its mean if None), decode.

        The noise is [B, latent_channels, h, w]. Returns (reconstruction, moments). One call, so that wrappers that hook
        into `forward` see all parameters used.
        """
        moments = self.encode(pixels_BCHW)
        latents = posterior_mean(moments) if noise_BCHW is None else sample_posterior(moments, noise_BCHW)
        return self.decode(latents), moments


@dataclass(frozen=True)
class IdentityConfig(NetworkConfig):
    """Configuration of a first stage that does nothing: latents are pixels."""

    latent_channels: int = 3
    """Number of channels of the latents, and of the pixels."""
    scaling_factor: float = 1.0
    shift_factor: float | None = None
    latents_mean: None = None
    latents_std: None = None
    sample_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, ("latent_channels", "sample_size"))
        if self.scaling_factor <= 0:
            raise ConfigError(f"scaling_factor = {self.scaling_factor}: must be above zero")

    @property
    def in_channels(self) -> int:
        return self.latent_channels

    @property
    def out_channels(self) -> int:
        return self.latent_channels

    @property
    def downsampling(self) -> int:
        """Pixels a side that one latent position stands for: 1."""
        return 1

    @classmethod
    def class_name(cls) -> str:
        return "IdentityAutoencoder"

    @classmethod
    def only_values(cls) -> Mapping[str, Collection[Any]]:
        return {}

    @classmethod
    def without_effect(cls) -> Collection[str]:
        return ()


class IdentityAutoencoder(nn.Module):
    """No first stage, behind the interface of one: with it, latent diffusion is diffusion of pixels (Sohl-Dickstein et
    al. 2015). It has no parameters."""

    config_class = IdentityConfig

    def __init__(self, config: IdentityConfig) -> None:
        super().__init__()
        self.config = config

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """Moments [B, 2·latent_channels, H, W] of a posterior that is the pixels: its log-variance is −30.

        Raises `InputError` if the pixels are not [B, latent_channels, H, W].
        """
        _check_map(pixels_BCHW, self.config.latent_channels, "pixels")
        return torch.cat([pixels_BCHW, torch.full_like(pixels_BCHW, LOG_VARIANCE_RANGE[0])], dim=1)

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """The latents. Raises `InputError` if they are not [B, latent_channels, H, W]."""
        _check_map(latents_BCHW, self.config.latent_channels, "latents")
        return latents_BCHW

    def for_inference(self) -> Self:
        """Itself, in evaluation mode."""
        return self.eval()

    def forward(self, pixels_BCHW: Tensor, noise_BCHW: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The reconstruction and the moments, as `AutoencoderKL` gives them."""
        moments = self.encode(pixels_BCHW)
        return posterior_mean(moments) if noise_BCHW is None else sample_posterior(moments, noise_BCHW), moments


class Encoder(Checkpointed):
    """Pixels to moments, before the quantisation convolution."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownEncoderBlock2D(before, after, config, downsample=index < len(widths) - 1)
            for index, (before, after) in enumerate(pairwise((widths[0], *widths)))
        )
        self.mid_block = MidBlock2D(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = self.conv_in(x_BCHW)
        for block in self.down_blocks:
            hidden = self.run(block, hidden)
        hidden = self.run(self.mid_block, hidden)
        output: Tensor = self.conv_out(F.silu(self.conv_norm_out(hidden)))
        return output


class Decoder(Checkpointed):
    """Latents to pixels, after the quantisation convolution."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock2D(widths[0], config)
        self.up_blocks = nn.ModuleList(
            UpDecoderBlock2D(before, after, config, upsample=index < len(widths) - 1)
            for index, (before, after) in enumerate(pairwise((widths[0], *widths)))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = self.run(self.mid_block, self.conv_in(x_BCHW))
        for block in self.up_blocks:
            hidden = self.run(block, hidden)
        output: Tensor = self.conv_out(F.silu(self.conv_norm_out(hidden)))
        return output


class DownEncoderBlock2D(nn.Module):
    """The residual blocks of one resolution of the encoder, then a halving."""

    def __init__(self, in_channels: int, out_channels: int, config: AutoencoderConfig, *, downsample: bool) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, config.layers_per_block, config)
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)] if downsample else [])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.downsamplers):
            x_BCHW = layer(x_BCHW)
        return x_BCHW


class UpDecoderBlock2D(nn.Module):
    """The residual blocks of one resolution of the decoder, then a doubling."""

    def __init__(self, in_channels: int, out_channels: int, config: AutoencoderConfig, *, upsample: bool) -> None:
        super().__init__()
        self.resnets = _resnets(in_channels, out_channels, config.layers_per_block + 1, config)
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)] if upsample else [])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x_BCHW = layer(x_BCHW)
        return x_BCHW


class MidBlock2D(nn.Module):
    """Two residual blocks at the coarsest resolution, with attention between them if the configuration says so."""

    def __init__(self, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        self.resnets = _resnets(channels, channels, 2, config)
        self.attentions = nn.ModuleList()
        if config.mid_block_add_attention:
            self.attentions.append(SpatialAttention(channels, groups=config.norm_num_groups, eps=EPS))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for layer in (self.resnets[0], *self.attentions, self.resnets[1]):
            x_BCHW = layer(x_BCHW)
        return x_BCHW


class Residual(ResnetBlock2D):
    """The residual block without time. It overwrites what nothing reads again: new memory costs a CPU time.

    The backward passes of normalisations and convolutions don't need their outputs; autograd keeps what SiLU's does.
    """

    def forward(self, x_BCHW: Tensor, time: Tensor | None = None) -> Tensor:
        assert time is None
        hidden = self.conv1(F.silu(self.norm1(x_BCHW), inplace=True))
        hidden = self.conv2(F.silu(self.norm2(hidden), inplace=True))
        shortcut = x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW)
        output: Tensor = hidden.add_(shortcut)
        return output


def _resnets(in_channels: int, out_channels: int, count: int, config: AutoencoderConfig) -> nn.ModuleList:
    return nn.ModuleList(
        Residual(before, out_channels, time_channels=None, groups=config.norm_num_groups, eps=EPS)
        for before in (in_channels, *(out_channels,) * (count - 1))
    )


def _entering(x_BCHW: Tensor, first: nn.Conv2d) -> Tensor:
    return x_BCHW.to(first.weight.dtype).contiguous(memory_format=torch.channels_last)


def _check_map(x_BCHW: Tensor, channels: int, name: str) -> None:
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] != channels:
        raise InputError(f"{name} are {tuple(x_BCHW.shape)}: must be [batch, {channels}, height, width]")
