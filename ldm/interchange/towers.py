"""CLIP's text towers in original checkpoints, to and from transformers' networks.

SD 1 and SDXL's first tower have transformers' own names. The others are open_clip's: queries, keys and values are one
matrix, and the projection is transposed. Their sizes are read from the weights; heads are 64 wide in all published
towers, and CLIP's own have a quick GELU where open_clip's have the exact one.

Stable Diffusion 2 reads the last layer but one. The tower is therefore one layer shorter here, as in diffusers; an
original checkpoint is given a last layer of zeros, which does nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning.pretrained import quiet
from ldm.errors import FolderError
from ldm.interchange.files import check_types
from ldm.interchange.keys import open_clip_keys

HEAD_WIDTH = 64
NOT_PARAMETERS = ("embeddings.position_ids", "position_ids", "logit_scale", "attn_mask")
TOKENS = "embeddings.token_embedding.weight"
POSITIONS = "embeddings.position_embedding.weight"
PROJECTION = "text_projection"
LAYER = re.compile(r"(?:layers|resblocks)\.(\d+)\.")


@dataclass(frozen=True)
class Tower:
    """A text tower in an original checkpoint."""

    prefix: str
    open_clip: bool
    """Whether it has open_clip's names, or transformers'."""
    projected: bool
    """Whether it gives a pooled vector, by a projection."""
    shorter: bool = False
    """Whether the last layer is not used, and left out here."""

    @property
    def kind(self) -> str:
        """transformers' class."""
        return "CLIPTextModelWithProjection" if self.projected else "CLIPTextModel"


def tower_from_original(tower: Tower, found: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> Any:
    """transformers' network of the tower in the checkpoint at `path`, whose tensors `found` has.

    Raises `FolderError` if parameters are absent, unknown, or of shapes that no tower has.
    """
    own = {name.removeprefix(tower.prefix): value for name, value in found.items() if name.startswith(tower.prefix)}
    own = {name.removeprefix("text_model."): value for name, value in own.items() if name not in NOT_PARAMETERS}
    if not own:
        raise FolderError(f"{path} has no {tower.prefix}*: it is without the text encoder that its U-Net reads")
    projection = own.pop(PROJECTION, None)
    weights = _from_open_clip(own, tower, path) if tower.open_clip else own
    for name in (TOKENS, POSITIONS, "encoder.layers.0.mlp.fc1.weight"):
        if name not in weights:
            raise FolderError(f"{path}: {tower.prefix}* lacks {name}: it is not the text tower of a CLIP")
    if tower.projected:
        if projection is None:
            raise FolderError(f"{path} lacks {tower.prefix}{PROJECTION}")
        weights = {f"text_model.{name}": value for name, value in weights.items()}
        weights[f"{PROJECTION}.weight"] = projection.T.contiguous()
    config = _config(weights, tower)
    return build_transformer(tower.kind, config, weights, dtype, f"{path}: {tower.prefix}*")


def tower_to_original(tower: Tower, network: Any) -> dict[str, Tensor]:
    """The checkpoint's parameters of the tower that is transformers' network.

    Raises `FolderError` for what is not in parameters, and not as in published towers.
    """
    state: dict[str, Tensor] = network.state_dict()
    read = _config(state, tower)
    for name in ("num_attention_heads", "hidden_act", "layer_norm_eps"):
        ours, theirs = getattr(network.config, name), getattr(read, name)
        if ours != theirs:
            raise FolderError(
                f"{name} = {ours!r}: an original checkpoint's {tower.prefix}* is read with {theirs!r}; save a folder"
            )
    inner = {name.removeprefix("text_model."): value for name, value in state.items()}
    projection = inner.pop(f"{PROJECTION}.weight", None)
    if not tower.open_clip:
        return {f"{tower.prefix}text_model.{name}": value for name, value in inner.items()}
    layers = _layers(inner)
    keys = open_clip_keys(layers)
    original = {theirs: torch.cat([inner[name] for name in ours]) for theirs, ours in keys.items()}
    if tower.shorter:
        last, unused = f"resblocks.{layers - 1}.", f"resblocks.{layers}."
        original |= {
            name.replace(last, unused): torch.zeros_like(value) for name, value in original.items() if last in name
        }
    if projection is not None:
        original[PROJECTION] = projection.T
    return {tower.prefix + name: value for name, value in original.items()}


def build_transformer(
    kind: str, config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype, source: str, optional: str | None = None
) -> Any:
    """transformers' network of that class and configuration with these weights, frozen.

    Names that contain `optional` may be absent. Raises `FolderError`, with the `source` of the weights, unless names
    and shapes are those of the configuration.
    """
    import transformers

    weights = {name: value for name, value in weights.items() if not name.endswith(NOT_PARAMETERS)}
    check_types(source, weights)
    try:
        with quiet():
            network, report = getattr(transformers, kind).from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise FolderError(f"{source}: {kind} can't be made from it: {error}") from error
    for name, found, wanted in sorted(report["mismatched_keys"], key=str):
        raise FolderError(f"{source}: {name} is {tuple(found)}, its {kind} asks for {tuple(wanted)}")
    lacking = sorted(name for name in report["missing_keys"] if optional is None or optional not in name)
    if lacking:
        raise FolderError(f"{source} lacks {len(lacking)} weights of its {kind}, such as {lacking[0]}")
    if report["unexpected_keys"]:
        unknown = sorted(report["unexpected_keys"])
        raise FolderError(f"{source} has unknown {len(unknown)} weights for its {kind}, such as {unknown[0]}")
    return network.eval().requires_grad_(False)


def _from_open_clip(own: Mapping[str, Tensor], tower: Tower, path: Path) -> dict[str, Tensor]:
    layers = _layers(own)
    keys = open_clip_keys(layers)
    lacking, unknown = sorted(set(keys) - set(own)), sorted(set(own) - set(keys))
    if lacking or unknown:
        what = f"lacks {tower.prefix}{lacking[0]}" if lacking else f"has unknown {tower.prefix}{unknown[0]}"
        raise FolderError(f"{path} {what}: it is not the text tower of an open_clip model")
    dropped = f"encoder.layers.{layers - 1}." if tower.shorter else "-"
    return {
        name: part.contiguous()
        for theirs, names in keys.items()
        for name, part in zip(names, own[theirs].chunk(len(names)), strict=True)
        if not name.startswith(dropped)
    }


def _config(weights: Mapping[str, Tensor], tower: Tower) -> Any:
    from transformers import CLIPTextConfig

    inner = {name.removeprefix("text_model."): value for name, value in weights.items()}
    vocabulary, width = inner[TOKENS].shape
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=len(inner["encoder.layers.0.mlp.fc1.weight"]),
        num_hidden_layers=_layers(inner),
        num_attention_heads=max(width // HEAD_WIDTH, 1),
        max_position_embeddings=len(inner[POSITIONS]),
        hidden_act="gelu" if tower.open_clip else "quick_gelu",
        projection_dim=len(inner[f"{PROJECTION}.weight"]) if tower.projected else width,
    )


def _layers(names: Mapping[str, Tensor]) -> int:
    """How many layers a tower's parameters are of."""
    return len({match[1] for name in names if (match := LAYER.search(name))})
