"""Files of models: JSON, and weights in safetensors, whole or in shards; pickles only where they are asked for.

What is wrong with a file is said in one `FolderError` that names it. What the values mean is left to others.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.conditioning.pretrained import read_json
from ldm.errors import ConfigError, FolderError

T = TypeVar("T")

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
ALLOW = "allow_pickle=True reads it, as plain tensors only"
WEIGHT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Types in which a tensor is a weight itself. Others are a code for one: whole numbers and 8-bit floats have scales."""
LORA = re.compile(
    r"[._](lora_?(A|B|up|down|mid)|to_(q|k|v|out)_lora|lora_linear_layer|hada_w\d|lokr_w\d|oft_diag)\b|\.lora\."
)
"""Pattern of names in files that have what is added to a model's weights, and not a model: low-rank matrices and their
like."""


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Sorted and indented: the same values give the same bytes."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def in_file(path: Path, build: Callable[[dict[str, Any]], T], values: dict[str, Any]) -> T:
    """`build(values)`, with the file's name in front of what is wrong."""
    try:
        return build(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def read_weights(
    path: Path,
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
    pickle_name: str | None = None,
    shards_first: bool = False,
) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of `path`, a `*.safetensors` that may lie in shards or have a variant, and the file that names them.

    Looked for, in this order: the variant's file (`name.fp16.safetensors`), the variant's index of shards
    (`name.safetensors.index.fp16.json`), the same two without the variant; then, with `allow_pickle`, the same of
    `pickle_name`, `name.bin` if None. With `shards_first`, shards go before a whole file: transformers reads the whole
    one where a folder has both, diffusers the shards. Raises `FolderError` if none is there, or one is corrupt.
    """
    pickled = path.with_name(pickle_name or f"{path.stem}.bin")
    for candidate in (
        *_candidates(path, variant, shards_first),
        *(_candidates(pickled, variant, shards_first) if allow_pickle else ()),
    ):
        if candidate.is_file():
            return candidate, _read(candidate, allow_pickle)
    pickles = sorted(other.name for suffix in PICKLES for other in path.parent.glob(f"*{suffix}"))
    found = f"; {', '.join(pickles)} is a pickle, and refused: {ALLOW}" if pickles else ""
    others = sorted(other.name for other in path.parent.glob("*.safetensors"))
    found += f"; {', '.join(others)} is there: give its variant" if others else ""
    raise FolderError(f"{path} is absent{found}")


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped into memory. Raises `FolderError` if it is absent or corrupt."""
    try:
        weights: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise FolderError(f"{path} is absent") from error
    except (SafetensorError, OSError) as error:
        raise FolderError(f"{path} is corrupt or can't be read: {error}") from error
    return weights


def write_safetensors(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the tensors in their dtypes; the same tensors give the same bytes."""
    save_file({name: value.detach().contiguous() for name, value in weights.items()}, path, metadata={"format": "pt"})


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, its `state_dict` if it has one. Nothing but tensors and plain containers is unpickled.

    Raises `FolderError` if it is absent, corrupt, or holds objects of any other kind.
    """
    if not path.is_file():
        raise FolderError(f"{path} is absent")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"an object of {kind[1]}" if kind else "more than tensors"
        raise FolderError(
            f"{path} is corrupt, or holds more than tensors: it has {what}, and is not unpickled. Write its weights as"
            " safetensors where you trust it"
        ) from error
    # A damaged pickle is a program that fails anywhere.
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FolderError(f"{path} is corrupt, or holds more than tensors: {reason}") from error
    for _ in range(2):  # Lightning's checkpoints have the weights one level down
        values = values.get("state_dict", values) if isinstance(values, dict) else {}
    weights = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    if not weights:
        raise FolderError(f"{path} holds no tensors by name")
    return weights


def check_parameters(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    """Raises `FolderError` unless the names and shapes in the file are those that `source` asks for."""
    for what, names in (("lacks", set(wanted) - set(found)), ("has unknown", set(found) - set(wanted))):
        if names:
            raise FolderError(f"{path} {what} {len(names)} parameters for {source}, such as {min(names)}")
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            shapes = f"{tuple(found[name].shape)}, {source} asks for {tuple(value.shape)}"
            raise FolderError(f"{path}: {name} is {shapes}")
    check_types(path, found)


def check_types(path: Path | str, weights: Mapping[str, Tensor]) -> None:
    """Raises `FolderError` for a tensor that is not a weight as it stands, but a quantised one's code."""
    for name, value in weights.items():
        if value.dtype not in WEIGHT_TYPES:
            known = ", ".join(str(each).removeprefix("torch.") for each in WEIGHT_TYPES)
            raise FolderError(f"{path}: {name} is {value.dtype}: quantised weights are not supported, only {known}")


def check_no_lora(path: Path, names: Iterable[str]) -> None:
    """Raises `FolderError` if the file has what is added to a model's weights, and not a model."""
    if any(LORA.search(name) for name in names):
        raise FolderError(f"{path} is a LoRA, and not a model: give it with --lora (merge_lora) and its base model")


def _candidates(path: Path, variant: str | None, shards_first: bool) -> list[Path]:
    plain = [path, path.with_name(f"{path.name}.index.json")]
    varied = [
        path.with_name(f"{path.stem}.{variant}{path.suffix}"),
        path.with_name(f"{path.name}.index.{variant}.json"),
    ]
    step = -1 if shards_first else 1
    return plain[::step] if variant is None else [*varied[::step], *plain[::step]]


def _read(path: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if path.suffix == ".json":
        return _read_shards(path, allow_pickle)
    if path.suffix not in PICKLES:
        return read_safetensors(path)
    if not allow_pickle:
        raise FolderError(f"{path} is a pickle, and refused: {ALLOW}")
    return read_pickle(path)


def _read_shards(index: Path, allow_pickle: bool) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise FolderError(f"{index} is corrupt: it has no weight_map")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or name == index.name:
            raise FolderError(f"{index}: shard {name!r} is not a file beside it, and refused")
        shard = _read(index.parent / name, allow_pickle)
        if twice := sorted(set(weights) & set(shard)):
            raise FolderError(f"{index}: {twice[0]} is in {places.get(twice[0])} and in {name}: only one can be meant")
        weights |= shard
    lacking = sorted(set(places) - set(weights))
    if lacking:
        raise FolderError(f"{index}: its shards lack {len(lacking)} parameters, such as {lacking[0]}")
    return weights


def read_checkpoint(path: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of one file of either kind. Raises `FolderError` if it is absent, corrupt, or a refused pickle."""
    if not path.is_file():
        raise FolderError(f"{path} is absent")
    return _read(path, allow_pickle)
