"""Model folders in the layout of diffusers, in and out.

    model_index.json  unet/  vae/  scheduler/  text_encoder/  tokenizer/

A folder written here loads in the stock pipeline of its kind (`pipeline_of`), and gives the same image for the same
noise. Weights are safetensors; pickles are refused unless asked for. The same model gives the same bytes.
`model_index.json` is written last: a folder without it is not a model. Safety checkers are not read, nor written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.conditioning import TextEncoder
from ldm.conditioning.pretrained import read_json
from ldm.config import is_of
from ldm.diffusion import Diffusion
from ldm.errors import ConfigError, FolderError
from ldm.interchange.encoders import (
    FORCE_ZEROS,
    Entries,
    NoTextEncoder,
    Source,
    check_text,
    forces_zeros,
    load_image,
    load_text,
    load_towers,
    save_image,
    save_text,
)
from ldm.interchange.files import in_file, write_json
from ldm.interchange.index import INDEX, check_class, flag, read_index
from ldm.interchange.networks import CONFIG, autoencoder_to_save, load_network, save_network
from ldm.interchange.schedulers import diffusion_config, read_scheduler, scheduler_config
from ldm.model import LatentDiffusion
from ldm.unet import UNet2DCondition, UNetConfig

T = TypeVar("T")

SCHEDULER = "scheduler_config.json"
COMPONENTS = (
    "feature_extractor",
    "image_encoder",
    "low_res_scheduler",
    "scheduler",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "unet",
    "vae",
)

STABLE_DIFFUSION = "StableDiffusionPipeline"
INPAINT = "StableDiffusionInpaintPipeline"
UPSCALE = "StableDiffusionUpscalePipeline"
IMAGE_VARIATION = "StableDiffusionImageVariationPipeline"
XL = "StableDiffusionXLPipeline"
XL_INPAINT = "StableDiffusionXLInpaintPipeline"
XL_REFINER = "StableDiffusionXLImg2ImgPipeline"
TEXT = (STABLE_DIFFUSION, "StableDiffusionImg2ImgPipeline", INPAINT, UPSCALE)
TOWERS = (XL, XL_INPAINT, XL_REFINER)
SCORED = (XL_INPAINT, XL_REFINER)
"""The pipelines that read `requires_aesthetics_score`."""
SIZED = (STABLE_DIFFUSION, "StableDiffusionImg2ImgPipeline", INPAINT, IMAGE_VARIATION)
"""The pipelines that take a small `sample_size` of an old file for 64."""
PIPELINES = (*TEXT, *TOWERS, IMAGE_VARIATION)
"""The pipelines whose folders are read."""
VERSION = "0.42.0"
"""Version of diffusers, whose layout this is. The stock inpainting pipeline doesn't load a folder that has none."""
UPSCALE_FACTOR = 0.08333
"""The autoencoder's `scaling_factor` that the stock upscaler has, whatever its config.json says."""
INPAINT_CHANNELS = 9


def pipeline_of(model: LatentDiffusion) -> str:
    """The stock pipeline that does what the model was trained for, by its parts."""
    if model.image_encoder is not None:
        return IMAGE_VARIATION
    if model.low_res_diffusion is not None:
        return UPSCALE
    inpaints = model.unet.config.in_channels == INPAINT_CHANNELS
    if not model.unet.config.takes_pooled:
        return INPAINT if inpaints else STABLE_DIFFUSION
    if inpaints:
        return XL_INPAINT
    return XL_REFINER if model.aesthetics_score else XL


def save_model(model: LatentDiffusion, folder: Path) -> None:
    """Write the model as a diffusers folder of `pipeline_of(model)`, which is made if needed.

    Raises `FolderError` if the encoder is not one of transformers, or the stock pipeline would make other images;
    `ConfigError` if diffusers has no scheduler of the process.
    """
    pipeline = pipeline_of(model)
    _check_saved(model, pipeline)
    scheduler = scheduler_config(model.diffusion.config, model.spacing, model.sampler, model.sampler_options, pipeline)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)
    save_network(model.unet, folder / "unet")
    save_network(autoencoder_to_save(model.autoencoder), folder / "vae")
    entries = _save_scheduler(folder / "scheduler", scheduler)
    if model.low_res_diffusion is not None:
        entries |= _save_scheduler(folder / "low_res_scheduler", _noising(model.low_res_diffusion))
    if model.image_encoder is not None:
        entries |= save_image(model.image_encoder, folder)
    else:
        entries |= save_text(model.text_encoder, folder)
    entries["unet"] = ["diffusers", model.unet.config.class_name()]
    entries["vae"] = ["diffusers", model.autoencoder.config.class_name()]
    write_json(
        folder / INDEX, {"_class_name": pipeline, "_diffusers_version": VERSION} | _settings(model, pipeline) | entries
    )


def load_model(
    folder: Path, dtype: torch.dtype = torch.float32, *, variant: str | None = None, allow_pickle: bool = False
) -> LatentDiffusion:
    """The model in a diffusers folder, on the CPU, ready to generate, its networks in `dtype` whatever the files'.

    `variant`, such as "fp16": its files are read where a network has them. `allow_pickle`: a network without
    safetensors is read from its pickle, as plain tensors only; a text encoder other than CLIP's never is. With float16,
    the autoencoder of an SDXL stays float32 if its config.json has `force_upcast`: its activations are more than
    float16 can hold.

    Raises `FolderError` naming the file that is absent, corrupt, or of another pipeline; `ConfigError` for shapes and
    schedules that are not supported.
    """
    index = read_index(folder)
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise FolderError(f"{folder / INDEX}: _class_name is {pipeline!r}, only {', '.join(PIPELINES)} are supported")
    check_class(folder, "unet", (UNetConfig.class_name(),))
    check_class(folder, "vae", (AutoencoderConfig.class_name(),))
    source = Source(folder, dtype, variant, allow_pickle)
    files: dict[str, Any] = {"variant": variant, "allow_pickle": allow_pickle}
    image = pipeline == IMAGE_VARIATION
    sampling = _load_scheduler(folder, index, "scheduler", lambda values, name: read_scheduler(values, name, pipeline))
    noising = _load_scheduler(folder, index, "low_res_scheduler", diffusion_config) if pipeline == UPSCALE else None
    return LatentDiffusion(
        unet=load_network(
            UNet2DCondition, folder / "unet", dtype, overrides=_size_of_old(folder / "unet" / CONFIG, pipeline), **files
        ).eval(),
        autoencoder=_load_autoencoder(folder / "vae", pipeline, dtype, files),
        text_encoder=NoTextEncoder() if image else _load_text(source, pipeline, index),
        diffusion=Diffusion(sampling.diffusion),
        image_encoder=load_image(source) if image else None,
        low_res_diffusion=None if noising is None else Diffusion(noising),
        max_noise_level=in_file(folder / INDEX, _max_noise_level, index),
        aesthetics_score=pipeline in SCORED and in_file(folder / INDEX, _requires_score, index),
        spacing=sampling.spacing,
        sampler=sampling.sampler,
        sampler_options=sampling.options,
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


def _check_saved(model: LatentDiffusion, pipeline: str) -> None:
    config = autoencoder_to_save(model.autoencoder).config
    _check_latents(config, pipeline)
    if pipeline == UPSCALE and config.scaling_factor != UPSCALE_FACTOR:
        raise FolderError(f"scaling_factor = {config.scaling_factor}: {pipeline} takes it for {UPSCALE_FACTOR}")
    if model.low_res_diffusion is not None and (
        model.low_res_diffusion.config.is_flow or model.low_res_diffusion.config.is_edm
    ):
        prediction = model.low_res_diffusion.config.prediction
        raise FolderError(f"low_res_diffusion is {prediction!r}: {pipeline} noises by a discrete process only")
    if model.image_encoder is None:
        check_text(model.text_encoder, towers=pipeline in TOWERS)


def _check_latents(config: AutoencoderConfig, pipeline: str) -> None:
    """Raises `FolderError` for a distribution of latents that the stock pipeline takes no notice of: XL's reads means
    and deviations, but for inpainting, where they are read on the way out alone; none reads a shift."""
    if config.shift_factor:
        raise FolderError(
            f"shift_factor = {config.shift_factor}: {pipeline} takes no notice of it, and would decode other images"
        )
    if config.latents_mean is not None and (pipeline not in TOWERS or pipeline == XL_INPAINT):
        where = "when it encodes" if pipeline == XL_INPAINT else "at all"
        raise FolderError(
            f"latents_mean = {config.latents_mean}, latents_std = {config.latents_std}: {pipeline} takes no notice of"
            f" them {where}, and would make other images"
        )


def _settings(model: LatentDiffusion, pipeline: str) -> dict[str, Any]:
    """The keys of model_index.json that are not of its components, and the components that are left out."""
    absent: list[str | None] = [None, None]
    if pipeline in TOWERS:
        both: Entries = {"text_encoder": absent, "tokenizer": absent}
        settings = {"feature_extractor": absent, "image_encoder": absent, FORCE_ZEROS: forces_zeros(model.text_encoder)}
        return both | settings | ({} if pipeline == XL else {"requires_aesthetics_score": model.aesthetics_score})
    settings = {"feature_extractor": absent, "safety_checker": absent}
    if pipeline == UPSCALE:
        return settings | {"max_noise_level": model.max_noise_level, "watermarker": absent}
    settings["requires_safety_checker"] = False
    return settings if pipeline == IMAGE_VARIATION else settings | {"image_encoder": absent}


def _save_scheduler(folder: Path, config: Mapping[str, Any]) -> Entries:
    folder.mkdir(exist_ok=True)
    write_json(folder / SCHEDULER, config)
    return {folder.name: ["diffusers", config["_class_name"]]}


def _noising(diffusion: Diffusion) -> dict[str, Any]:
    """The scheduler_config.json of a process that is used to noise, and not to solve."""
    names = ("num_train_timesteps", "prediction_type", "rescale_betas_zero_snr")
    config = scheduler_config(diffusion.config)
    kept = {name: value for name, value in config.items() if name in names or name.startswith("beta")}
    return {"_class_name": "DDPMScheduler"} | kept


def _max_noise_level(index: Mapping[str, Any]) -> int:
    level = index.get("max_noise_level", LatentDiffusion.max_noise_level)
    if not is_of(level, int) or level < 0:
        raise ConfigError(f"max_noise_level = {level!r}: must be a whole number, 0 or above")
    return int(level)


def _load_scheduler(
    folder: Path, index: Mapping[str, Any], part: str, read: Callable[[dict[str, Any], str | None], T]
) -> T:
    """What `read` makes of the scheduler, by the class that model_index.json names (the one that diffusers builds), or
    else by the file's own."""
    entry, path = index.get(part), folder / part / SCHEDULER
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    return in_file(path, lambda values: read(values, name), read_json(path))


def _load_text(source: Source, pipeline: str, index: dict[str, Any]) -> TextEncoder:
    if pipeline in TOWERS:
        return in_file(source.folder / INDEX, lambda values: load_towers(source, values), index)
    return load_text(source)


def _load_autoencoder(folder: Path, pipeline: str, dtype: torch.dtype, files: Mapping[str, Any]) -> AutoencoderKL:
    overrides = {"scaling_factor": UPSCALE_FACTOR} if pipeline == UPSCALE else None
    upcast = pipeline in TOWERS and dtype == torch.float16 and read_json(folder / CONFIG).get("force_upcast", True)
    network = load_network(AutoencoderKL, folder, torch.float32 if upcast else dtype, overrides=overrides, **files)
    try:
        _check_latents(network.config, pipeline)
    except FolderError as error:
        raise FolderError(f"{folder / CONFIG}: {error}") from error
    return network.eval()


def _size_of_old(path: Path, pipeline: str) -> dict[str, int]:
    """The U-Net's `sample_size`, where a file from before diffusers 0.9 means something else by it; else nothing."""
    values = read_json(path)
    version, size = str(values.get("_diffusers_version", "")), values.get("sample_size")
    old = re.match(r"0\.[0-8](\.|$)", version) is not None
    return {"sample_size": 64} if old and pipeline in SIZED and isinstance(size, int) and 0 < size < 64 else {}


def _requires_score(index: Mapping[str, Any]) -> bool:
    return flag(index, "requires_aesthetics_score", False)
