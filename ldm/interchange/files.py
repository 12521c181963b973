"""Files of models: JSON, and weights in safetensors, whole or in shards; pickles only where they are asked for.

What is wrong with a file is said in one `FolderError` that names it. What the values mean is left to others.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
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
    path: Path, *, variant: str | None = None, allow_pickle: bool = False, pickle_name: str | None = None
) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of `path`, a `*.safetensors` that may lie in shards or have a variant, and the file that names them.

    Looked for, in this order: the variant's file (`name.fp16.safetensors`), the variant's index of shards
    (`name.safetensors.index.fp16.json`), the same two without the variant; then, with `allow_pickle`, the same of
    `pickle_name`, `name.bin` if None. Raises `FolderError` if none is there, or one is corrupt.
    """
    pickled = path.with_name(pickle_name or f"{path.stem}.bin")
    for candidate in _candidates(path, variant) + (_candidates(pickled, variant) if allow_pickle else []):
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

    Raises `FolderError` if it is absent, corrupt, or holds anything else.
    """
    if not path.is_file():
        raise FolderError(f"{path} is absent")
    try:
        values = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FolderError(f"{path} is corrupt, or holds more than tensors: {reason}") from error
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


def _candidates(path: Path, variant: str | None) -> list[Path]:
    plain = [path, path.with_name(f"{path.name}.index.json")]
    if variant is None:
        return plain
    return [
        path.with_name(f"{path.stem}.{variant}{path.suffix}"),
        path.with_name(f"{path.name}.index.{variant}.json"),
        *plain,
    ]


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
    if not isinstance(places, dict) or not places:
        raise FolderError(f"{index} is corrupt: it has no weight_map")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name or name == index.name:
            raise FolderError(f"{index}: shard {name!r} is not a file beside it, and refused")
        weights |= _read(index.parent / name, allow_pickle)
    lacking = sorted(set(places) - set(weights))
    if lacking:
        raise FolderError(f"{index}: its shards lack {len(lacking)} parameters, such as {lacking[0]}")
    return weights


def read_checkpoint(path: Path, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of one file of either kind. Raises `FolderError` if it is absent, corrupt, or a refused pickle."""
    if not path.is_file():
        raise FolderError(f"{path} is absent")
    return _read(path, allow_pickle)
