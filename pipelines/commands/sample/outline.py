"""A model without its weights: its networks' shapes and its process, of the JSON files or the header of a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.conditioning.pretrained import read_json
from ldm.config import is_of
from ldm.diffusion import Diffusion, DiffusionConfig, Prediction
from ldm.errors import ConfigError, FolderError
from ldm.interchange import LAYOUTS, diffusion_config, read_scheduler
from ldm.interchange.encoders import NoTextEncoder
from ldm.interchange.files import check_no_lora, in_file
from ldm.interchange.folders import IMAGE_VARIATION, PIPELINES, SCHEDULER, SCORED, UPSCALE, UPSCALE_FACTOR
from ldm.interchange.index import INDEX, check_class, class_of, flag, read_index
from ldm.interchange.networks import ABSENT, CONFIG
from ldm.interchange.single_file import V_PREDICTION, ZERO_SNR, detect
from ldm.model import LatentDiffusion
from ldm.unet import UNet2DCondition, UNetConfig


@dataclasses.dataclass(frozen=True)
class Outline:
    """What can be told of a model before its weights are read."""

    model: LatentDiffusion
    """The model, with its networks on the meta device, and without encoders."""
    varies: bool = False
    """Whether it reads images in the place of prompts."""

    @property
    def upscales(self) -> bool:
        """Whether it makes images larger."""
        return self.model.low_res_diffusion is not None


def outline_of_folder(folder: Path) -> Outline:
    """The outline of a diffusers folder. Raises `FolderError` and `ConfigError` as `ldm.interchange.load_model`."""
    index = read_index(folder)
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise FolderError(f"{folder / INDEX}: _class_name is {pipeline!r}, only {', '.join(PIPELINES)} are supported")
    check_class(folder, "unet", (UNetConfig.class_name(),))
    check_class(folder, "vae", (AutoencoderConfig.class_name(),))
    path = folder / "scheduler" / SCHEDULER
    name = class_of(folder, "scheduler")
    sampling = in_file(path, lambda values: read_scheduler(values, name, pipeline), read_json(path))
    scaled = {"scaling_factor": UPSCALE_FACTOR} if pipeline == UPSCALE else {}
    return Outline(
        _model(
            _config(UNet2DCondition, folder / "unet", {}),
            _config(AutoencoderKL, folder / "vae", scaled),
            sampling.diffusion,
            low_res_diffusion=_noising(folder) if pipeline == UPSCALE else None,
            max_noise_level=_max_noise_level(index),
            aesthetics_score=pipeline in SCORED and flag(index, "requires_aesthetics_score", False),
            spacing=sampling.spacing,
            sampler=sampling.sampler,
            sampler_options=sampling.options,
        ),
        varies=pipeline == IMAGE_VARIATION,
    )


def outline_of_file(path: Path, prediction: Prediction | None) -> Outline:
    """The outline of an original checkpoint, by the header of its safetensors.

    Raises `FolderError` and `ConfigError` as `ldm.interchange.load_single_file`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{path} is corrupt or can't be read: {error}") from error
    check_no_lora(path, shapes)
    layout = LAYOUTS[detect({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, path)]
    process = layout.diffusion
    if V_PREDICTION in shapes:
        process = dataclasses.replace(process or DiffusionConfig("eps"), prediction="v")
    if ZERO_SNR in shapes and process is not None:
        process = dataclasses.replace(process, zero_terminal_snr=True)
    if prediction is not None:
        process = dataclasses.replace(process or DiffusionConfig("eps"), prediction=prediction)
    if process is None:
        raise ConfigError(f"{path} doesn't tell what it predicts: give --prediction eps, or v")
    return Outline(
        _model(
            layout.unet,
            layout.autoencoder,
            process,
            low_res_diffusion=None if layout.low_res_diffusion is None else Diffusion(layout.low_res_diffusion),
            max_noise_level=layout.max_noise_level,
            aesthetics_score=layout.aesthetics_score,
        )
    )


def _model(unet: UNetConfig, autoencoder: AutoencoderConfig, process: DiffusionConfig, **more: Any) -> LatentDiffusion:
    with torch.device("meta"):
        networks = UNet2DCondition(unet), AutoencoderKL(autoencoder)
    return LatentDiffusion(*networks, NoTextEncoder(), Diffusion(process), **more)


def _config(network: type[AutoencoderKL] | type[UNet2DCondition], folder: Path, overrides: dict[str, Any]) -> Any:
    path = folder / CONFIG
    return in_file(path, network.config_class.from_dict, ABSENT[network] | read_json(path) | overrides)


def _max_noise_level(index: dict[str, Any]) -> int:
    level = index.get("max_noise_level", LatentDiffusion.max_noise_level)
    if not is_of(level, int):
        raise FolderError(f"{INDEX}: max_noise_level = {level!r}: must be a whole number")
    return int(level)


def _noising(folder: Path) -> Diffusion:
    path, name = folder / "low_res_scheduler" / SCHEDULER, class_of(folder, "low_res_scheduler")
    return Diffusion(in_file(path, lambda values: diffusion_config(values, name), read_json(path)))
