"""What training begins with: nothing, weights that come with the package, or weights from a folder."""

from __future__ import annotations

import hashlib
import json
import tempfile
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec

from pipelines.recipe.errors import RecipeError

if TYPE_CHECKING:
    from ldm.autoencoder import AutoencoderConfig, AutoencoderKL

SCRATCH = "scratch"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
DESCRIPTIVE_KEYS = {"sample_size", "scaling_factor", "shift_factor"}
"""Keys of a configuration that say nothing of the weights' shapes."""


def shipped_weights() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(folder.name for folder in _shipped().iterdir()) if _shipped().is_dir() else []


def weights_sha256(init: str) -> str | None:
    """sha256 of the file of weights that `init` names; None for "scratch". Raises `RecipeError` if there is none."""
    return None if init == SCRATCH else hashlib.sha256(_read(init, WEIGHTS)).hexdigest()


def load_autoencoder(network: AutoencoderKL, init: str) -> None:
    """Take over the weights that `init` names, in float32.

    Raises `RecipeError` if there are none, or they are of another shape; `ldm.errors.LdmError` if they can't be loaded.
    """
    from ldm.interchange import load_network

    with tempfile.TemporaryDirectory(prefix="ldm-weights-") as folder:
        for name in (CONFIG, WEIGHTS):
            (Path(folder) / name).write_bytes(_read(init, name))
        found = load_network(type(network), Path(folder)).float()
    _check_shape(found.config, network.config, init)
    network.load_state_dict(found.state_dict())


def config_of(init: str) -> AutoencoderConfig:
    """The configuration of the weights that `init` names. Raises `RecipeError` if there are none, or they are no
    AutoencoderKL's."""
    from ldm.autoencoder import AutoencoderConfig
    from ldm.errors import ConfigError

    try:
        return AutoencoderConfig.from_dict(json.loads(_read(init, CONFIG)))
    except (ConfigError, ValueError, AttributeError) as error:
        raise RecipeError(f"init = {init!r}: {CONFIG} is no AutoencoderKL's ({error}); name another folder") from error


def shape_misfits(found: AutoencoderConfig, asked: AutoencoderConfig) -> list[str]:
    """The differences of two networks of which the one is to take the other's weights: ["latent_channels 4 (here
    8)"]."""
    theirs, ours = found.to_dict(), asked.to_dict()
    differing = [key for key in ours if key not in DESCRIPTIVE_KEYS and ours[key] != theirs[key]]
    return [f"{key} {theirs[key]} (here {ours[key]})" for key in differing]


def _check_shape(found: AutoencoderConfig, asked: AutoencoderConfig, init: str) -> None:
    misfits = shape_misfits(found, asked)
    if misfits:
        raise RecipeError(
            f"the weights of init = {init!r} are of another shape: {', '.join(misfits)}; change `network`, or init to"
            f" {SCRATCH}"
        )


def _read(init: str, name: str) -> bytes:
    if init in shipped_weights():
        return (_shipped() / init / name).read_bytes()
    try:
        with fsspec.open(f"{init.rstrip('/')}/{name}") as file:
            content: bytes = file.read()
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(
            f"init = {init!r}: {name} can't be read there ({error}); give {SCRATCH!r}, {', '.join(shipped_weights())}"
            " (which come with the package), or a folder with an AutoencoderKL"
        ) from error
    return content


def _shipped() -> Traversable:
    return resources.files("configs") / "weights"
