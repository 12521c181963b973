"""The U-Net that denoises latents under a context (Rombach et al. 2022, section 3.3), in diffusers' standard shapes.

Built by configuration; those of published models are in `ldm.shapes`. What the output means (noise, velocity, flow) is
left to `ldm.diffusion`. Parameter names are those of diffusers' UNet2DConditionModel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ldm.blocks import DownBlock2D, Level, MidBlock2DCrossAttn, UpBlock2D
from ldm.config import MOST_LAYERS, NetworkConfig, check_blocks, check_groups, check_positive, per_block
from ldm.errors import ConfigError, InputError
from ldm.layers import TimestepEmbedding, time_embedding

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
    only_cross_attention: bool | tuple[bool, ...] = False
    """Transformers attend to the context twice, and not to themselves (SD x4 upscaler). The middle always does both."""
    num_class_embeds: int | None = None
    """Noise levels of the low-resolution image that an upscaler's latents come with. None: it takes no noise level."""
    addition_embed_type: str | None = None
    """"text_time": a pooled vector and sizes are embedded with the time (SDXL)."""
    addition_time_embed_dim: int | None = None
    """Width of the sinusoidal embedding of each size."""
    projection_class_embeddings_input_dim: int | None = None
    """Width of the pooled vector and all embedded sizes together."""
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks(self.block_out_channels)
        blocks = len(self.block_out_channels)
        for key, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            names = getattr(self, key)
            unknown = sorted(set(names) - set(known))
            if unknown:
                raise ConfigError(f"{key} has {', '.join(unknown)}: supported are {', '.join(known)}")
            if len(names) != blocks:
                raise ConfigError(f"{key} has {len(names)} entries, block_out_channels {blocks}: give one for each")
        check_positive(
            self,
            (
                *("in_channels", "out_channels", "sample_size", "block_out_channels"),
                *("attention_head_dim", "norm_num_groups"),
            ),
        )
        check_positive(self, ("layers_per_block", "transformer_layers_per_block"), MOST_LAYERS)
        if self.norm_eps <= 0:
            raise ConfigError(f"norm_eps = {self.norm_eps}: must be above zero")
        check_groups(self.block_out_channels, self.norm_num_groups)
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % heads:
                raise ConfigError(f"attention_head_dim = {heads} heads do not divide {channels} channels")
        for key in ("layers_per_block", "transformer_layers_per_block", "only_cross_attention"):
            per_block(getattr(self, key), blocks, key)
        if isinstance(self.cross_attention_dim, tuple):
            raise ConfigError(
                f"cross_attention_dim = {self.cross_attention_dim}: one width for all blocks is supported"
            )
        check_positive(self, ("cross_attention_dim",))
        if self.num_class_embeds is not None:
            check_positive(self, ("num_class_embeds",))
        if self.addition_embed_type not in (None, "text_time"):
            raise ConfigError(f"addition_embed_type = {self.addition_embed_type!r}: supported are 'text_time' and null")
        if self.takes_pooled:
            check_positive(self, ("addition_time_embed_dim", "projection_class_embeddings_input_dim"))
        if not 0 <= self.freq_shift < self._narrowest_waves // 2:
            raise ConfigError(f"freq_shift = {self.freq_shift}: must be 0 or more, and below half an embedding's width")

    @property
    def takes_pooled(self) -> bool:
        """Whether the network takes a pooled vector and sizes."""
        return self.addition_embed_type == "text_time"

    @property
    def _narrowest_waves(self) -> int:
        sizes = self.addition_time_embed_dim if self.takes_pooled else None
        return min(self.block_out_channels[0], sizes or self.block_out_channels[0])

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
            "dual_cross_attention": (False,),
            "mid_block_scale_factor": (1,),
            "mid_block_type": ("UNetMidBlock2DCrossAttn",),
            "resnet_out_scale_factor": (1.0,),
            "resnet_skip_time_act": (False,),
            "resnet_time_scale_shift": ("default",),
            "time_embedding_type": ("positional",),
        }

    @classmethod
    def without_effect(cls) -> Collection[str]:
        # The middle block of this type doesn't read mid_block_only_cross_attention in diffusers either.
        # Dropout is for training alone, and here there is none of it.
        return ("addition_embed_type_num_heads", "dropout", "mid_block_only_cross_attention")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        # SDXL's file has null for false.
        return super().from_dict({k: v for k, v in values.items() if not (k == "upcast_attention" and v is None)})

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"act_fn": "silu", "mid_block_type": "UNetMidBlock2DCrossAttn"}


class UNet2DCondition(nn.Module):
    """The U-Net of one configuration.

    Weights are contiguous, as sharded optimizers want them. Without such an optimizer,
    `to(memory_format=torch.channels_last)` saves a rearrangement of every convolution's weights a step. For inference
    there is `for_inference`.
    """

    config_class = UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        levels = _levels(config)
        time_channels = levels[0].time_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_channels)
        if config.num_class_embeds is not None:
            self.class_embedding = nn.Embedding(config.num_class_embeds, time_channels)
        if config.takes_pooled:
            assert config.projection_class_embeddings_input_dim is not None
            self.add_embedding = TimestepEmbedding(config.projection_class_embeddings_input_dim, time_channels)
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

    def for_inference(self) -> Self:
        """Make the network fast to run, in place, and return it: evaluation mode, no gradients, weights in the memory
        format of the feature maps. Its state stays the same. Not for training: sharded optimizers want contiguous
        weights."""
        return self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(
        self,
        latents_BCHW: Tensor,
        timesteps_B: Tensor,
        context_BLD: Tensor,
        mask_BL: Tensor | None = None,
        *,
        pooled_BP: Tensor | None = None,
        sizes_BS: Tensor | None = None,
        noise_level_B: Tensor | None = None,
    ) -> Tensor:
        """The network's prediction [B, out_channels, H, W], in the latents' dtype.

        Computes in the weights' dtype, or in autocast's. `timesteps_B` are 0 to 1000,
        whole or fractional. `mask_BL` is true where the context may be attended to; None means everywhere. Networks
        with `addition_embed_type` take one vector a sample, `pooled_BP`, and S numbers, `sizes_BS` (Podell et al. 2023,
        section 2.2); networks with `num_class_embeds` take whole `noise_level_B`, how noisy the low-resolution image
        among the latents' channels is (Ho et al. 2022, section 4.2).

        Raises `InputError` if the inputs are not those that the configuration asks for, or if their shapes don't fit
        it or each other.
        """
        _check_inputs(self.config, latents_BCHW, timesteps_B, context_BLD, mask_BL)
        _check_extras(self.config, len(context_BLD), pooled_BP, sizes_BS, noise_level_B)
        dtype = self.conv_in.weight.dtype
        time = self._time(timesteps_B, pooled_BP, sizes_BS, noise_level_B)
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

    def _time(
        self, timesteps_B: Tensor, pooled_BP: Tensor | None, sizes_BS: Tensor | None, noise_level_B: Tensor | None
    ) -> Tensor:
        """What every residual block adds: the sum of all embeddings of one number a sample, activated once [B, D]."""
        config, dtype = self.config, self.conv_in.weight.dtype

        def waves(numbers: Tensor, width: int) -> Tensor:
            flip, shift = config.flip_sin_to_cos, config.freq_shift
            return time_embedding(numbers, width, flip_sin_to_cos=flip, freq_shift=shift).to(dtype)

        embedding: Tensor = self.time_embedding(waves(timesteps_B, config.block_out_channels[0]))
        if noise_level_B is not None:
            embedding = embedding + self.class_embedding(noise_level_B)
        if pooled_BP is not None and sizes_BS is not None:
            assert config.addition_time_embed_dim is not None
            sizes = waves(sizes_BS.flatten(), config.addition_time_embed_dim).view(len(sizes_BS), -1)
            embedding = embedding + self.add_embedding(torch.cat([pooled_BP.to(dtype), sizes], dim=1))
        return F.silu(embedding)


def _levels(config: UNetConfig) -> list[Level]:
    blocks = len(config.block_out_channels)
    return [
        Level(
            layers=layers,
            time_channels=4 * config.block_out_channels[0],
            heads=heads,
            transformer_layers=transformer_layers,
            only_cross_attention=only_cross_attention,
            context_width=config.cross_attention_dim,
            linear_projection=config.use_linear_projection,
            upcast=config.upcast_attention,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
        )
        for layers, heads, transformer_layers, only_cross_attention in zip(
            per_block(config.layers_per_block, blocks, "layers_per_block"),
            config.heads,
            per_block(config.transformer_layers_per_block, blocks, "transformer_layers_per_block"),
            per_block(config.only_cross_attention, blocks, "only_cross_attention"),
            strict=True,
        )
    ]


def _check_inputs(
    config: UNetConfig,
    latents: Tensor,
    timesteps: Tensor,
    context: Tensor,
    mask: Tensor | None,
) -> None:
    if latents.ndim != 4 or latents.shape[1] != config.in_channels:
        raise InputError(f"latents are {tuple(latents.shape)}: must be [batch, {config.in_channels}, height, width]")
    if not latents.is_floating_point():
        raise InputError(f"latents are {latents.dtype}: must be of a floating-point type")
    batch = latents.shape[0]
    if timesteps.shape != (batch,):
        raise InputError(f"timesteps are {tuple(timesteps.shape)}: must be one a sample, ({batch},)")
    width = config.cross_attention_dim
    if context.ndim != 3 or context.shape[0] != batch or context.shape[2] != width:
        raise InputError(f"context is {tuple(context.shape)}: must be [{batch}, length, {width}]")
    if mask is not None and (mask.shape != context.shape[:2] or mask.dtype != torch.bool):
        shape = tuple(context.shape[:2])
        raise InputError(f"mask is {mask.dtype} {tuple(mask.shape)}: must be torch.bool {shape}, as the context")


def _check_extras(
    config: UNetConfig, batch: int, pooled: Tensor | None, sizes: Tensor | None, noise_level: Tensor | None
) -> None:
    for name, value in (("pooled", pooled), ("sizes", sizes)):
        if (value is not None) != config.takes_pooled:
            rule = f"addition_embed_type = {config.addition_embed_type!r}"
            raise InputError(f"{name} {_must_be(config.takes_pooled)}: the network has {rule}")
    if (noise_level is not None) != (config.num_class_embeds is not None):
        rule = f"num_class_embeds = {config.num_class_embeds}"
        raise InputError(f"noise_level {_must_be(noise_level is None)}: the network has {rule}")
    if pooled is not None and sizes is not None:
        assert config.addition_time_embed_dim is not None
        whole, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
        for name, value in (("pooled", pooled), ("sizes", sizes)):
            if value.ndim != 2 or value.shape[0] != batch:
                raise InputError(f"{name} is {tuple(value.shape)}: must be [{batch}, width]")
        if pooled.shape[1] + each * sizes.shape[1] != whole:
            raise InputError(
                f"pooled is {pooled.shape[1]} wide and there are {sizes.shape[1]} sizes, embedded in {each} each: "
                f"together they must be {whole} wide"
            )
    if noise_level is not None and (noise_level.shape != (batch,) or noise_level.dtype != torch.int64):
        raise InputError(
            f"noise_level is {noise_level.dtype} {tuple(noise_level.shape)}: must be torch.int64 ({batch},)"
        )


def _must_be(wanted: bool) -> str:
    return "is missing" if wanted else "was given"
