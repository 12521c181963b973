"""Frozen networks of transformers from local folders: config.json and safetensors. Nothing is downloaded, no pickle is
opened, and a folder that lacks weights is refused, where transformers would draw them at random.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import FolderError

PLAIN_TYPES = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the types in which a tensor is a weight itself, and not a code for one."""


def load_pretrained(
    folder: Path, kind: str, *, optional: Sequence[str] = (), config: Any = None, variant: str | None = None
) -> Any:
    """The network in a folder as transformers' class `kind`, float32, frozen, on the CPU.

    Weights whose names contain one of `optional` may be absent: parts that are not used. `variant`, such as "fp16": its
    files are read if the folder has them. Raises `FolderError` if files are absent or corrupt, weights are pickles, or
    weights don't fit the configuration.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    if not (folder / "config.json").is_file():
        raise FolderError(f"{folder / 'config.json'} is absent: give the folder of a transformers {kind}")
    if not any(folder.glob("*.safetensors")):
        raise FolderError(f"{folder} has no *.safetensors: weights are only read from safetensors, never from pickles")
    read_config(folder / "config.json")
    variant = variant if any(folder.glob(f"model*.{variant}[.-]*")) else None
    for file in _weight_files(folder, variant):
        _check_file_types(file, f"{kind} in {folder}")
    try:
        with quiet():
            network, report = getattr(transformers, kind).from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                variant=variant,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (
        *(OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError),
        *(SafetensorError, StrictDataclassError),
    ) as error:
        raise FolderError(f"{kind} in {folder} can't be read: {error}") from error
    lacking = sorted(name for name in report["missing_keys"] if not any(part in name for part in optional))
    if lacking:
        raise FolderError(f"{folder} lacks {len(lacking)} weights of its {kind}, such as {lacking[0]}")
    return network.eval().requires_grad_(False)


def load_processor(folder: Path, kind: str) -> Any:
    """The tokenizer or feature extractor in a folder, as transformers' class `kind`. Raises `FolderError`."""
    import transformers

    if not folder.is_dir():
        raise FolderError(f"{folder} is absent: give the folder of a transformers {kind}")
    try:
        return getattr(transformers, kind).from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(f"{kind} in {folder} can't be read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file. Raises `FolderError` if it is absent, corrupt, or something else than an object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FolderError(f"{path} is absent") from error
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} is corrupt or can't be read: {error}") from error
    if not isinstance(values, dict):
        raise FolderError(f"{path} is corrupt: must hold a JSON object")
    return values


def read_config(path: Path) -> dict[str, Any]:
    """A config.json of transformers. Raises `FolderError` if it is absent or corrupt, or asks for weights that are not
    plain ones: quantised, or in a file of another name."""
    values = read_json(path)
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise FolderError(f"{path}: {key} = {value}: must be a finite number")
    for key in ("quantization_config", "compression_config", "transformers_weights"):
        if values.get(key) is not None:
            raise FolderError(
                f"{path}: {key} = {values[key]!r:.80}: only plain weights in files of the usual names are read"
            )
    return values


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files that transformers reads: one, or the shards of an index."""
    part = "" if variant is None else f".{variant}"
    whole, index = folder / f"model{part}.safetensors", folder / f"model.safetensors.index{part}.json"
    if whole.is_file() or not index.is_file():
        return [whole] if whole.is_file() else []
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise FolderError(f"{index} is corrupt: it has no weight_map")
    return [folder / str(name) for name in sorted(set(map(str, names.values())))]


def _check_file_types(file: Path, source: str) -> None:
    """Raises `FolderError` for a file that is absent or corrupt, or has a weight that is a quantised one's code.

    transformers would take the code for the weight. Whole numbers of 64 bits are buffers, such as positions."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            types = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{source} can't be read: {file}: {error}") from error
    for name, found in types.items():
        buffer = found == "I64" and not name.endswith((".weight", ".bias"))
        if found not in PLAIN_TYPES and not buffer:
            raise FolderError(
                f"{file}: {name} is {found}: quantised weights are not supported, only {', '.join(PLAIN_TYPES)}"
            )


def device_of(network: nn.Module) -> torch.device:
    """Where the network's weights are."""
    return next(network.parameters()).device


def weights_sha256(state: dict[str, Tensor]) -> str:
    """Hex sha256 over the tensors in the order of their names: name, dtype, shape, bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars, and its reports of what a folder lacks, off the terminal."""
    from transformers.utils import logging as transformers_logging

    shown, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
