"""Low-rank adaptations (LoRA, Hu et al. 2021) of a model: their files, merged into its weights, W + scale · α/r · B·A.

Files of diffusers (`unet.….lora_A.weight`), of its older versions (`….processor.to_q_lora.down.weight`,
`….lora_linear_layer.down.weight`), and of kohya's scripts (`lora_unet_….lora_down.weight`, with diffusers' names of
layers or the original checkpoints'). A file is merged whole or not at all: each of its tensors must have its place.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ldm.conditioning.clip_text import PairedTextEncoder
from ldm.conditioning.text import TransformersTextEncoder
from ldm.config import is_of
from ldm.errors import ConfigError, FolderError
from ldm.interchange.encoders import text_parts
from ldm.interchange.files import PICKLES, check_types, read_safetensors
from ldm.interchange.keys import unet_keys
from ldm.model import LatentDiffusion
from ldm.unet import UNetConfig

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The file's name in a folder that diffusers wrote."""
METADATA = "lora_adapter_metadata"
"""The entry of a safetensors header in which diffusers keeps peft's configuration."""
KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
}
ENDS = re.compile(
    r"(?:\.lora_(?P<peft>[AB])|\.lora_(?P<kohya>down|up)|\.lora\.(?P<plain>down|up)"
    r"|\.to_(?P<layer>q|k|v|out)_lora\.(?P<old>down|up)|\.lora_linear_layer\.(?P<text>down|up))\.weight$"
)
ALPHA = re.compile(r"(?:\.lora|\.lora_linear_layer|\.to_(?P<layer>q|k|v|out)_lora)?\.alpha$")
OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon in Tucker's form",
    "oft_": "OFT",
    "boft_": "BOFT",
    ".bias": "a LoRA of biases",
    ".diff": "a difference of whole weights",
}
NEUTRAL = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "base_model_name_or_path", "revision", "task_type"),
    *("inference_mode", "auto_mapping", "peft_version", "qalora_group_size", "megatron_core", "ensure_weight_tying"),
}
"""Keys of peft's configuration that are read here, or say nothing of the merged weights."""
USUAL = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
    "runtime_config": ({"ephemeral_gpu_offload": False},),
}
"""Keys that have to have one of these values, if any. All others have to be empty or false."""


@dataclass(frozen=True)
class Pair:
    """The two matrices that are added to one layer, of rank r."""

    down: Tensor
    """[r, in] or [r, in, height, width]."""
    up: Tensor
    """[out, r] or [out, r, 1, 1]."""
    alpha: float | None
    """α, where it stands beside them."""


@dataclass(frozen=True)
class Addition:
    """What is added to a weight: `factor` · up · down."""

    weight: Tensor
    down: Tensor
    up: Tensor
    factor: float

    def apply(self) -> None:
        """Add it in place, computed in float32, whatever the types are."""
        device = self.weight.device
        up, down = (part.to(device, torch.float32).flatten(1) for part in (self.up, self.down))
        added = (self.factor * (up @ down)).view(self.weight.shape)
        with torch.no_grad():
            self.weight.copy_(self.weight.float() + added)


def merge_lora(model: LatentDiffusion, file: Path, scale: float = 1.0) -> None:
    """Add a LoRA file to the model's weights, in place, `scale` times: what `load_lora_weights` and `fuse_lora` of
    diffusers do. `file` is a safetensors, or a folder with diffusers' `pytorch_lora_weights.safetensors`.

    A layer's α is its `.alpha`, or that of peft's configuration in the file's header, or else its rank r. (In kohya's
    files, diffusers 0.42 loses an attention projection's α where it is another than most of the file's.) For training
    or merging at another scale, load the model anew.

    Raises `ConfigError` for a scale that is no number, `FolderError`, with nothing merged, if the file is absent,
    corrupt, of another kind (DoRA, LoHa, LoKr), or has a tensor that has no place in this model or another shape than
    its layer.
    """
    if not math.isfinite(scale):
        raise ConfigError(f"scale = {scale}: must be a finite number")
    file = file / WEIGHTS if file.is_dir() else file
    if file.suffix in PICKLES:
        raise FolderError(f"{file} is a pickle, and refused: LoRAs are read from safetensors only")
    weights = read_safetensors(file)
    if not weights:
        raise FolderError(f"{file} has no tensors")
    _check_kind(file, weights)
    layers, settings = _layers(model), _settings(file)
    pairs = _pairs(file, weights, layers.keys(), model.unet.config)
    if settings and any(pair.alpha is not None for pair in pairs.values()):
        raise FolderError(f"{file} has both .alpha and {METADATA}: only one can be meant")
    additions = [
        _addition(file, place, layers[place], pair, scale * _factor(file, place, pair, settings))
        for place, pair in pairs.items()
    ]
    for addition in additions:
        addition.apply()
    for encoder in _text_encoders(model).values():
        encoder.forget()


# -- where tensors belong ----------------------------------------------------------------------------------------------

Place = tuple[str, str]
"""A part of a diffusers folder, and the name of a layer in it."""


def _text_encoders(model: LatentDiffusion) -> dict[str, TransformersTextEncoder]:
    if not isinstance(model.text_encoder, TransformersTextEncoder | PairedTextEncoder):
        return {}
    return {f"text_encoder{number}": encoder for number, encoder in text_parts(model.text_encoder).items()}


def _layers(model: LatentDiffusion) -> dict[Place, nn.Linear | nn.Conv2d]:
    """All layers that a LoRA can be of. Versions of transformers differ in a leading `text_model`."""
    networks: dict[str, nn.Module] = {"unet": model.unet}
    networks |= {part: encoder.network for part, encoder in _text_encoders(model).items()}
    return {
        (part, name.removeprefix("text_model.")): layer
        for part, network in networks.items()
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def _kohya_places(layers: Iterable[Place], originals: Mapping[str, str]) -> dict[str, Place]:
    """Each layer by kohya's names for it, in which dots are underscores. `originals`: of the U-Net's parameters."""
    places: dict[str, Place] = {}
    for part, layer in layers:
        if part == "unet":
            names = (layer, originals[f"{layer}.weight"].removesuffix(".weight"))
        else:
            names = (layer, f"text_model.{layer}")
        for prefix in (prefix for prefix, meant in KOHYA.items() if meant == part):
            places |= {prefix + name.replace(".", "_"): (part, layer) for name in names}
    return places


def _place(name: str, kohya: Mapping[str, Place]) -> tuple[Place, str] | None:
    """The layer that the file's tensor is of, and which of its tensors it is: "down", "up" or "alpha"."""
    match = ENDS.search(name) or ALPHA.search(name)
    if match is None:
        return None
    found = {key: value for key, value in match.groupdict().items() if value is not None}
    attention = found.pop("layer", None)
    what = "alpha" if match.re is ALPHA else next(iter(found.values()))
    what = {"A": "down", "B": "up"}.get(what, what)
    stem = name[: match.start()]
    if stem.startswith(tuple(KOHYA)):
        return (kohya[stem], what) if stem in kohya else None
    part, _, layer = stem.partition(".")
    layer = layer.replace(".processor", "").removeprefix("text_model.")
    if attention is not None and part == "unet":
        layer += ".to_out.0" if attention == "out" else f".to_{attention}"
    elif attention is not None:
        layer += f".{attention}_proj"
    return (part, layer), what


def _pairs(file: Path, weights: Mapping[str, Tensor], layers: Collection[Place], unet: UNetConfig) -> dict[Place, Pair]:
    """The file's matrices by their layers. Raises `FolderError` for a tensor that has no place, or no partner."""
    of_kohya = any(name.startswith(tuple(KOHYA)) for name in weights)
    kohya = _kohya_places(layers, unet_keys(unet)) if of_kohya else {}
    pairs: dict[Place, dict[str, Tensor]] = {}
    for name, value in weights.items():
        found = _place(name, kohya)
        if found is None or found[0] not in layers:
            raise FolderError(f"{file} has {name}, for which this model has no layer: it is not a LoRA of this model")
        place, what = found
        if what in pairs.setdefault(place, {}):
            raise FolderError(f"{file} has {name}, and another {what} of {'.'.join(place)}: only one can be meant")
        pairs[place][what] = value
    return {place: _pair(file, ".".join(place), parts) for place, parts in pairs.items()}


def _pair(file: Path, layer: str, parts: Mapping[str, Tensor]) -> Pair:
    lacking = {"down", "up"} - set(parts)
    if lacking:
        raise FolderError(f"{file} lacks the {min(lacking)} matrix of {layer}")
    check_types(f"{file}: {layer}", {what: parts[what] for what in ("down", "up")})
    for what, value in parts.items():
        if not value.isfinite().all() or (what == "alpha" and value.numel() != 1):
            raise FolderError(f"{file}: {what} of {layer} has values that are not numbers, or not one")
    return Pair(parts["down"], parts["up"], float(parts["alpha"]) if "alpha" in parts else None)


def _addition(file: Path, place: Place, layer: nn.Linear | nn.Conv2d, pair: Pair, factor: float) -> Addition:
    """Raises `FolderError` unless the product of the two matrices has the weight's shape."""
    found, wanted = (tuple(pair.down.shape), tuple(pair.up.shape)), tuple(layer.weight.shape)
    rank, ones = pair.down.shape[:1], (1,) * (len(wanted) - 2)
    if found != ((*rank, *wanted[1:]), (wanted[0], *rank, *ones)):
        raise FolderError(
            f"{file}: {'.'.join(place)} has matrices of {found[0]} and {found[1]}, which don't fit its weight, {wanted}"
        )
    return Addition(layer.weight, pair.down, pair.up, factor)


# -- what their scale is -----------------------------------------------------------------------------------------------


def _check_kind(file: Path, weights: Mapping[str, Tensor]) -> None:
    for name in weights:
        for mark, kind in OTHER_KINDS.items():
            if mark in name:
                raise FolderError(f"{file} has {name}: {kind} is not supported, only LoRA is")


def _settings(file: Path) -> dict[str, dict[str, Any]]:
    """peft's configuration of each part, from the header. Raises `FolderError` for what it would do otherwise."""
    try:
        with safe_open(file, framework="pt") as opened:
            values = json.loads((opened.metadata() or {}).get(METADATA, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise FolderError(f"{file}: {METADATA} is corrupt: {error}") from error
    if not isinstance(values, dict):
        raise FolderError(f"{file}: {METADATA} is corrupt: must hold a JSON object")
    settings: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, _, key = name.partition(".")
        usual: tuple[Any, ...] = USUAL.get(key, (None, False, [], {}, 0))
        if key not in NEUTRAL and value is not None and value not in usual:
            raise FolderError(f"{file}: {METADATA}: {name} = {value!r:.80} is not supported")
        if key in ("rank_pattern", "alpha_pattern") and not isinstance(value, dict | None):
            raise FolderError(f"{file}: {METADATA}: {name} = {value!r:.80}: must be an object")
        settings.setdefault(part, {})[key] = value
    return settings


def _factor(file: Path, place: Place, pair: Pair, settings: Mapping[str, Mapping[str, Any]]) -> float:
    """α / r, or α / √r where peft's configuration says so (Kalajdzievski 2023)."""
    rank = len(pair.down)
    if pair.alpha is not None:
        return pair.alpha / rank
    own = settings.get(place[0], {})
    names = (place[1], f"text_model.{place[1]}")
    told, alpha = (
        next(
            (
                value
                for key, value in (own.get(pattern) or {}).items()
                if any(re.match(rf"(.*\.)?({key})$", name) for name in names)
            ),
            own.get(default, rank),
        )
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    if told != rank or not is_of(alpha, float) or not math.isfinite(alpha):
        name = ".".join(place)
        raise FolderError(f"{file}: {METADATA}: {name} has rank {told!r} and alpha {alpha!r}, its matrices rank {rank}")
    return float(alpha) / (math.sqrt(rank) if own.get("use_rslora") else rank)
