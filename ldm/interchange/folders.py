"""Model folders in the layout of diffusers, in and out.

    model_index.json  unet/  vae/  scheduler/  text_encoder/  tokenizer/

A folder written here loads in the stock `diffusers.StableDiffusionPipeline`, and gives the same image for the same
noise. Weights are safetensors; pickles are refused. The same model gives the same bytes. `model_index.json` is written
last: a folder without it is not a model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.autoencoder import AutoencoderKL
from ldm.conditioning.text import TransformersTextEncoder, load_text_folders
from ldm.diffusion import Diffusion
from ldm.errors import ConfigError, FolderError
from ldm.generate import LatentDiffusion
from ldm.interchange.schedulers import diffusion_config, scheduler_config
from ldm.unet import UNet2DCondition

Network = TypeVar("Network", AutoencoderKL, UNet2DCondition)

INDEX = "model_index.json"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SCHEDULER = "scheduler_config.json"
PIPELINE = "StableDiffusionPipeline"
COMPONENTS = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")

# -- models ------------------------------------------------------------------------------------------------------------


def save_model(model: LatentDiffusion, folder: Path) -> None:
    """Write the model as a diffusers folder, which is made if needed.

    Raises `FolderError` if the text encoder is not a transformers encoder, or the autoencoder has a shift factor: the
    stock pipeline takes no notice of it.
    """
    if not isinstance(model.text_encoder, TransformersTextEncoder):
        raise FolderError(f"{type(model.text_encoder).__name__} can't be saved: only transformers encoders can")
    shift = model.autoencoder.config.shift_factor
    if shift:
        raise FolderError(f"shift_factor = {shift}: {PIPELINE} takes no notice of it, and would decode other images")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    save_network(model.unet, folder / "unet")
    save_network(model.autoencoder, folder / "vae")
    model.text_encoder.save(folder / "text_encoder", folder / "tokenizer")
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = scheduler_config(model.diffusion.config)
    _write_json(folder / "scheduler" / SCHEDULER, scheduler)
    _write_json(
        folder / INDEX,
        {
            "_class_name": PIPELINE,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "text_encoder": ["transformers", type(model.text_encoder.network).__name__],
            "tokenizer": ["transformers", type(model.text_encoder.tokenizer).__name__],
            "unet": ["diffusers", model.unet.config.class_name()],
            "vae": ["diffusers", model.autoencoder.config.class_name()],
        },
    )


def load_model(folder: Path) -> LatentDiffusion:
    """The model in a diffusers folder, float32, on the CPU, ready to generate.

    Raises `FolderError` naming the file that is absent, corrupt, or of another pipeline; `ConfigError` for shapes and
    schedules that are not supported.
    """
    index = _read_json(folder / INDEX)
    if index.get("_class_name") != PIPELINE:
        raise FolderError(
            f"{folder / INDEX}: _class_name is {index.get('_class_name')!r}, only {PIPELINE} is supported"
        )
    scheduler = folder / "scheduler" / SCHEDULER
    return LatentDiffusion(
        unet=load_network(UNet2DCondition, folder / "unet").eval(),
        autoencoder=load_network(AutoencoderKL, folder / "vae").eval(),
        text_encoder=load_text_folders(folder / "text_encoder", folder / "tokenizer", name="text_encoder"),
        diffusion=Diffusion(_in_file(scheduler, diffusion_config, _read_json(scheduler))),
    )


def model_hash(folder: Path) -> str:
    """Hex sha256 over the names and contents of the model's files: those of its components, and model_index.json.

    Raises `FolderError` if it is not a model folder.
    """
    if not (folder / INDEX).is_file():
        raise FolderError(f"{folder / INDEX} is absent: this is not a model folder")
    files = [folder / INDEX, *(path for part in COMPONENTS for path in (folder / part).rglob("*") if path.is_file())]
    digest = hashlib.sha256()
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


# -- networks ----------------------------------------------------------------------------------------------------------


def save_network(network: AutoencoderKL | UNet2DCondition, folder: Path) -> None:
    """Write config.json and the weights, in their dtype, into the folder, which is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG, network.config.to_dict())
    save_file(
        {name: value.detach().contiguous() for name, value in network.state_dict().items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )


def load_network(cls: type[Network], folder: Path, dtype: torch.dtype = torch.float32) -> Network:
    """The network in a folder that `save_network` or diffusers wrote, on the CPU, in `dtype` whatever the file's.

    Raises `FolderError` naming the file that is absent, corrupt, a pickle, or without fitting parameters; `ConfigError`
    for a configuration that is not supported.
    """
    path = folder / CONFIG
    config = _in_file(path, cls.config_class.from_dict, _read_json(path))
    weights = _read_weights(folder / WEIGHTS)
    # Parameters come from the file: initialising them first would be lost work.
    with torch.device("meta"):
        network = cls(config)
    _check_parameters(folder / WEIGHTS, weights, network.state_dict())
    network.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    return network


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        pickles = sorted(other.name for suffix in ("*.bin", "*.pt", "*.ckpt") for other in path.parent.glob(suffix))
        found = f"; {', '.join(pickles)} is a pickle, and refused" if pickles else ""
        raise FolderError(f"{path} is absent{found}")
    try:
        weights: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FolderError(f"{path} is corrupt or can't be read: {error}") from error
    return weights


def _check_parameters(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for what, names in (("lacks", set(wanted) - set(found)), ("has unknown", set(found) - set(wanted))):
        if names:
            raise FolderError(f"{path} {what} {len(names)} parameters for its {CONFIG}, such as {min(names)}")
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            shapes = f"{tuple(found[name].shape)}, its {CONFIG} asks for {tuple(value.shape)}"
            raise FolderError(f"{path}: {name} is {shapes}")


# -- files -------------------------------------------------------------------------------------------------------------


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FolderError(f"{path} is absent") from error
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} is corrupt or can't be read: {error}") from error
    if not isinstance(values, dict):
        raise FolderError(f"{path} is corrupt: must hold a JSON object")
    return values


def _in_file(path: Path, build: Any, values: Mapping[str, Any]) -> Any:
    """`build(values)`, with the file's name in front of what is wrong."""
    try:
        return build(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
