"""Image networks of folders that transformers saved. Nothing is downloaded, and no pickled weights are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.errors import FolderError
from ldm.features.extractor import package


def load_vision(folder: Path, network: str, types: Sequence[str], device: torch.device) -> Any:
    """The frozen network of transformers' class `network`, float32, if the folder's configuration is of one of `types`.

    Raises `ExtractorMissing` without transformers, `FolderError` if the folder holds no such model.
    """
    transformers = package("transformers", "transformers")
    kind = _model_type(folder)
    if kind not in types:
        raise FolderError(f"{folder} holds a {kind!r}: must be one of {', '.join(types)}")
    try:
        model, report = getattr(transformers, network).from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise FolderError(f"no {network} in {folder}: {str(error).splitlines()[0]}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise FolderError(f"{folder} lacks {len(missing)} weights of {network}, {missing[0]} for one")
    return model.eval().requires_grad_(False).to(device)


def image_processor(folder: Path) -> Any:
    """transformers' preprocessing that the folder configures. Raises as `load_vision`."""
    transformers = package("transformers", "transformers")
    try:
        return transformers.CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise FolderError(f"no preprocessor_config.json in {folder}: {str(error).splitlines()[0]}") from error


def _model_type(folder: Path) -> Any:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FolderError(
            f"{folder} has no config.json with a model_type ({error!r}): save_pretrained writes it"
        ) from error
