"""Names of parameters in original checkpoints (CompVis, Stability AI), for each of the names used here.

The names here are diffusers' and transformers'. Each map is a pure function of a configuration, in both directions
since its values are distinct. Names are those within a network; where the networks lie in a checkpoint is
`ldm.interchange.single_file`'s matter.

The original U-Net (Dhariwal & Nichol 2021) counts its blocks through all resolutions: `input_blocks.N`,
`middle_block`, `output_blocks.N`, each a short list of layers. The original autoencoder (Esser et al. 2021) counts
resolutions from the finest, on the way up too, where the blocks here are in the order of the computation.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.config import per_block
from ldm.unet import UP_BLOCKS, UNet2DCondition, UNetConfig

UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
AUTOENCODER_RESNET = {"conv_shortcut": "nin_shortcut"}
AUTOENCODER_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called the layers of the autoencoder's attention before its version 0.15."""
OPEN_CLIP_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
OPEN_CLIP_LAYER = {
    "ln_1": ("layer_norm1",),
    "attn.in_proj_": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.out_proj": ("self_attn.out_proj",),
    "ln_2": ("layer_norm2",),
    "mlp.c_fc": ("mlp.fc1",),
    "mlp.c_proj": ("mlp.fc2",),
}


@functools.cache
def unet_keys(config: UNetConfig) -> Mapping[str, str]:
    """Original name of each of the U-Net's parameters."""
    modules = UNET_ENDS | _resnet("mid_block.resnets.0", "middle_block.0", UNET_RESNET)
    modules |= _resnet("mid_block.resnets.1", "middle_block.2", UNET_RESNET)
    layers = per_block(config.layers_per_block, len(config.block_out_channels), "layers_per_block")
    count = 1
    for level, depth in enumerate(layers):
        block = f"down_blocks.{level}"
        for index in range(depth):
            modules |= _resnet(f"{block}.resnets.{index}", f"input_blocks.{count}.0", UNET_RESNET)
            modules[f"{block}.attentions.{index}"] = f"input_blocks.{count}.1"
            count += 1
        modules[f"{block}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
        count += 1
    count = 0
    for level, (name, depth) in enumerate(zip(config.up_block_types, layers[::-1], strict=True)):
        block = f"up_blocks.{level}"
        for index in range(depth + 1):
            modules |= _resnet(f"{block}.resnets.{index}", f"output_blocks.{count}.0", UNET_RESNET)
            modules[f"{block}.attentions.{index}"] = f"output_blocks.{count}.1"
            count += 1
        # The last list of a resolution: residual block, transformer if there is one, upsampling.
        modules[f"{block}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{1 + UP_BLOCKS[name]}.conv"
    with torch.device("meta"):
        return _renamed(UNet2DCondition(config), modules)


@functools.cache
def autoencoder_keys(config: AutoencoderConfig) -> Mapping[str, str]:
    """Original name of each of the autoencoder's parameters."""
    blocks = len(config.block_out_channels)
    modules: dict[str, str] = {}
    for part in ("encoder", "decoder"):
        modules |= {f"{part}.conv_in": f"{part}.conv_in", f"{part}.conv_out": f"{part}.conv_out"}
        modules[f"{part}.conv_norm_out"] = f"{part}.norm_out"
        for index in range(2):
            ours, theirs = f"{part}.mid_block.resnets.{index}", f"{part}.mid.block_{index + 1}"
            modules |= _resnet(ours, theirs, AUTOENCODER_RESNET)
        modules |= _resnet(f"{part}.mid_block.attentions.0", f"{part}.mid.attn_1", AUTOENCODER_ATTENTION)
    for level in range(blocks):
        ours, theirs = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        modules[f"{ours}.downsamplers.0"] = f"{theirs}.downsample"
        for index in range(config.layers_per_block):
            modules |= _resnet(f"{ours}.resnets.{index}", f"{theirs}.block.{index}", AUTOENCODER_RESNET)
        ours, theirs = f"decoder.up_blocks.{blocks - 1 - level}", f"decoder.up.{level}"
        modules[f"{ours}.upsamplers.0"] = f"{theirs}.upsample"
        for index in range(config.layers_per_block + 1):
            modules |= _resnet(f"{ours}.resnets.{index}", f"{theirs}.block.{index}", AUTOENCODER_RESNET)
    with torch.device("meta"):
        return _renamed(AutoencoderKL(config), modules)


def open_clip_keys(layers: int) -> dict[str, tuple[str, ...]]:
    """Names within transformers' CLIP text model, for each of open_clip's names of a text tower of so many layers.

    Several names: open_clip has their tensors as one, stacked along the first axis in this order. `text_projection`
    is not among them: it is transposed.
    """
    names: dict[str, tuple[str, ...]] = {theirs: (ours,) for theirs, ours in OPEN_CLIP_ENDS.items()}
    for layer in range(layers):
        for theirs, parts in OPEN_CLIP_LAYER.items():
            for kind in ("weight", "bias"):
                stem = f"transformer.resblocks.{layer}.{theirs}"
                key = stem + kind if stem.endswith("_") else f"{stem}.{kind}"
                names[key] = tuple(f"encoder.layers.{layer}.{part}.{kind}" for part in parts)
    return names


def ema_key(name: str) -> str:
    """Where a checkpoint has the moving average of the U-Net's parameter with this original name."""
    return "model_ema.diffusion_model" + name.replace(".", "")


def with_todays_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A diffusers network's parameters, with the names that today's versions give to layers of attention."""
    return {_todays(name): value for name, value in weights.items()}


def _todays(name: str) -> str:
    module, _, kind = name.rpartition(".")
    parent, _, leaf = module.rpartition(".")
    return f"{parent}.{OLD_ATTENTION[leaf]}.{kind}" if ".attentions." in parent and leaf in OLD_ATTENTION else name


def _resnet(ours: str, theirs: str, inner: Mapping[str, str]) -> dict[str, str]:
    """The module itself, for layers whose names agree, and those of its layers whose names don't."""
    return {ours: theirs} | {f"{ours}.{mine}": f"{theirs}.{other}" for mine, other in inner.items()}


def _renamed(network: nn.Module, modules: Mapping[str, str]) -> dict[str, str]:
    """Each parameter's original name: the innermost known module that it lies in is renamed, the rest stays."""
    renamed = {}
    for name in network.state_dict():
        module, rest = name, ""
        while module and module not in modules:
            module, _, last = module.rpartition(".")
            rest = f".{last}{rest}"
        renamed[name] = modules[module] + rest if module else name
    assert len(set(renamed.values())) == len(renamed)
    return renamed
