"""One network's folder in diffusers' layout: config.json, and the weights in diffusion_pytorch_model.safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ldm.autoencoder import AutoencoderKL, IdentityAutoencoder
from ldm.conditioning.pretrained import read_json
from ldm.errors import FolderError
from ldm.interchange.files import check_parameters, in_file, read_weights, write_json, write_safetensors
from ldm.interchange.keys import with_todays_names
from ldm.unet import UNet2DCondition

Network = TypeVar("Network", AutoencoderKL, UNet2DCondition)

CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
ABSENT: dict[type[AutoencoderKL] | type[UNet2DCondition], dict[str, Any]] = {
    UNet2DCondition: {"cross_attention_dim": 1280},
    AutoencoderKL: {"block_out_channels": [64], "layers_per_block": 1},
}
"""What diffusers takes a key for that config.json does not have, where that is something else than the default here."""


def save_network(network: AutoencoderKL | UNet2DCondition, folder: Path) -> None:
    """Write config.json and the weights, in their dtype, into the folder, which is made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, network.config.to_dict())
    write_safetensors(folder / WEIGHTS, network.state_dict())


def load_network(
    cls: type[Network],
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    variant: str | None = None,
    allow_pickle: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Network:
    """The network in a folder that `save_network` or diffusers wrote, on the CPU, in `dtype` whatever the file's.

    `variant` as in `ldm.interchange.files.read_weights`; `overrides` take the place of config.json's values.

    Raises `FolderError` naming the file that is absent, corrupt, a pickle, or without fitting parameters; `ConfigError`
    for a configuration that is not supported.
    """
    path = folder / CONFIG
    config = in_file(path, cls.config_class.from_dict, ABSENT[cls] | read_json(path) | dict(overrides or {}))
    source, weights = read_weights(folder / WEIGHTS, variant=variant, allow_pickle=allow_pickle, shards_first=True)
    return build_network(cls, config, with_todays_names(weights), dtype, source, f"its {CONFIG}")


def build_network(
    cls: type[Network], config: Any, weights: Mapping[str, Tensor], dtype: torch.dtype, path: Path, source: str
) -> Network:
    """A network of that configuration with these weights, from the file at `path`, in `dtype`.

    Raises `FolderError` unless names and shapes are those of the configuration, which `source` gave.
    """
    # Parameters come from the file: initialising them first would be lost work.
    with torch.device("meta"):
        network = cls(config)
    check_parameters(path, weights, network.state_dict(), source)
    network.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    return network


def autoencoder_to_save(autoencoder: AutoencoderKL | IdentityAutoencoder) -> AutoencoderKL:
    """The autoencoder, if it is one. Raises `FolderError` for a model of pixels, which has no folder in diffusers."""
    if not isinstance(autoencoder, AutoencoderKL):
        raise FolderError(
            f"{type(autoencoder).__name__}: a model of pixels has no stock pipeline; save its U-Net alone"
        )
    return autoencoder
