"""What `ldm sample` is asked for, and the pictures of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.commands.sample.models import hash_of, ignored, load, resolve_model
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.diffusion import Prediction
    from ldm.generate import LatentDiffusion, Options

Progress = Callable[[int, int], None]
DTYPES = ("float32", "bfloat16", "float16")
COLUMNS = 8
LARGEST_SEED = 2**63
OPTIONS = {
    "prompts": "--prompt",
    "negative_prompts": "--negative-prompt",
    "masks": "--mask",
    "strength": "--strength",
    "size": "--size",
    "refiner": "--refiner",
    "upscalers": "--upscaler",
}
OPAQUE = 127
"""Grey levels of a mask above this are made anew."""


@dataclass(frozen=True)
class Request:
    """One call of `ldm sample`. Names are those of its options."""

    model: str
    overrides: Sequence[str] = ()
    """Of the recipe that `model` names."""
    prompts: Sequence[str] = ()
    negative_prompts: Sequence[str] = ()
    images: Sequence[Path] = ()
    masks: Sequence[Path] = ()
    count: int = 1
    """Pictures of each prompt, or of each image where the model reads images."""
    seed: int = 0
    """Of the first picture; the next ones count up."""
    size: tuple[int, int] | None = None
    """Height and width in pixels."""
    strength: float | None = None
    noise_level: int | None = None
    guidance_scale: float = 3.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    weak: str | None = None
    refiner: str | None = None
    refine_from: float = 0.8
    upscalers: Sequence[str] = ()
    sampler: str = "dpmpp_2m"
    steps: int = 20
    spacing: str | None = None
    eta: float | None = None
    threshold: tuple[float, float] | None = None
    original_size: tuple[int, int] | None = None
    """Of networks that are conditioned on sizes, as the next two."""
    crop: tuple[int, int] = (0, 0)
    aesthetic_score: float = 6.0
    batch_size: int = 16
    max_pixels: int | None = None
    long_prompts: str = "cut"
    device: str = "auto"
    dtype: str = "float32"
    variant: str | None = None
    prediction: Prediction | None = None
    allow_pickle: bool = False
    progress: Progress | None = field(default=None, compare=False)
    tell: Callable[[str], None] = field(default=ignored, compare=False)
    """Is told which release a recipe's is."""


SHOWN = (
    *("guidance_rescale", "guidance_interval", "spacing", "eta", "threshold", "strength", "noise_level"),
    *("original_size", "crop", "aesthetic_score", "long_prompts", "dtype", "variant", "negative_prompts"),
)
"""What a picture's file tells of its request, where it is not left as it is."""


@dataclass(frozen=True)
class Models:
    """All that a request needs, loaded."""

    main: LatentDiffusion
    refiner: LatentDiffusion | None
    weak: LatentDiffusion | None
    upscalers: Sequence[LatentDiffusion]


def sample(request: Request, out: Path, grid: Path | None) -> list[Path]:
    """Write one PNG a picture into `out`, and `grid` if given; the paths written. Each file says how it was made.

    Raises `UsageError` for what can't be asked for, `ldm.errors.LdmError` for what the models can't do.
    """
    from ldm.errors import ConfigError, InputError
    from ldm.images import image_grid, save_png

    _check_places(out, grid)
    _check(request)
    paths = {name: resolve_model(name, _overrides(request, name), request.tell) for name in _names(request)}
    try:
        pictures = made(request, _loaded(request, paths))
    except (ConfigError, InputError) as error:  # what was asked for doesn't fit the model, or anything
        raise UsageError(str(error)) from error
    prompts = _repeated(request.prompts, len(pictures))
    facts = _facts(request, {name: hash_of(path) for name, path in paths.items()})
    written = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(pictures):
            file = out / f"{index:05d}.png"
            own = {"prompt": prompts[index]} if prompts else {}
            save_png(image, file, facts | own | {"seed": request.seed + index})
            written.append(file)
        if grid is not None:
            grid.parent.mkdir(parents=True, exist_ok=True)
            save_png(image_grid(pictures, columns=min(COLUMNS, len(pictures))), grid, facts)
            written.append(grid)
    except OSError as error:
        raise UsageError(f"pictures can't be written: {error}") from error
    return written


def made(request: Request, models: Models) -> Tensor:
    """The pictures, uint8 [N, H, W, 3]: by the task that the model and what it is given make."""
    from ldm import generate

    model = models.main
    images, masks = (_read(files, mode) for files, mode in ((request.images, "RGB"), (request.masks, "L")))
    if model.image_encoder is not None:
        _refuse(request, "it varies images", "prompts", "negative_prompts", "masks", "strength", "refiner", "upscalers")
        if images is None:
            raise UsageError(f"{request.model} varies images and reads no prompts: give --image")
        images = images.repeat_interleave(request.count, dim=0)
        return generate.image_variations(
            model, images, size=request.size, **_options(request, len(images), models.weak)
        )
    if not request.prompts:
        raise UsageError("no prompts: give --prompt, once for each picture")
    count = max(len(request.prompts), 0 if images is None else len(images)) * request.count
    prompts, options = _repeated(request.prompts, count), _options(request, count, models.weak)
    if images is None:
        _refuse(request, "no image is given", "masks", "strength")
        if model.low_res_diffusion is not None:
            raise UsageError(f"{request.model} makes images larger: give --image")
        pictures = generate.text_to_image(
            model, prompts, size=request.size, refiner=models.refiner, refine_from=request.refine_from, **options
        )
    else:
        _refuse(request, "an image is given", "size", "refiner")
        pictures = _of_images(model, prompts, _spread(images, count), masks, request, options)
    for upscaler in models.upscalers:
        pictures = generate.upscale(upscaler, prompts, pictures, **_noise_level(request), **_options(request, count))
    return pictures


def _of_images(
    model: LatentDiffusion,
    prompts: list[str],
    images: Tensor,
    masks: Tensor | None,
    request: Request,
    options: Options,
) -> Tensor:
    from ldm import generate

    if model.low_res_diffusion is not None:
        _refuse(request, "it makes images larger", "masks", "strength")
        return generate.upscale(model, prompts, images, **_noise_level(request), **options)
    given: Any = {} if request.strength is None else {"strength": request.strength}
    if masks is None:
        return generate.image_to_image(model, prompts, images, **given, **options)
    anew = _spread(masks[..., 0] > OPAQUE, len(prompts))
    return generate.inpaint(model, prompts, images, anew, **given, **options)


# -- models ------------------------------------------------------------------------------------------------------------


def _names(request: Request) -> list[str]:
    return [name for name in (request.model, request.refiner, request.weak, *request.upscalers) if name is not None]


def _overrides(request: Request, name: str) -> Sequence[str]:
    return request.overrides if name == request.model else ()


def _loaded(request: Request, paths: Mapping[str, Path]) -> Models:
    main = _load(request, paths[request.model], request.prediction)
    others = {name: _load(request, paths[name], None) for name in _names(request)[1:]}
    models = Models(
        main,
        None if request.refiner is None else others[request.refiner],
        None if request.weak is None else others[request.weak],
        [others[name] for name in request.upscalers],
    )
    if models.weak is not None and models.weak.diffusion.config != main.diffusion.config:
        raise UsageError(f"--weak {request.weak}: its process or prediction is not that of {request.model}")
    for name, upscaler in zip(request.upscalers, models.upscalers, strict=True):
        if upscaler.low_res_diffusion is None:
            raise UsageError(f"--upscaler {name}: the model is no upscaler")
    upscales = any(each.low_res_diffusion is not None for each in (main, *models.upscalers))
    if request.noise_level is not None and not upscales:
        raise UsageError("--noise-level without a model that makes images larger: leave it out")
    return models


def _load(request: Request, path: Path, prediction: Prediction | None) -> LatentDiffusion:
    import torch

    from ldm.conditioning.prompts import check_long_prompts
    from ldm.interchange.encoders import text_parts

    model = load(
        path,
        getattr(torch, request.dtype),
        prediction=prediction,
        variant=request.variant,
        allow_pickle=request.allow_pickle,
    )
    if request.long_prompts != "cut" and model.image_encoder is None:
        for encoder in text_parts(model.text_encoder).values():
            check_long_prompts(request.long_prompts, encoder.tokenizer)
            encoder.long_prompts = request.long_prompts  # type: ignore[assignment]
    device = request.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).for_inference()


def _options(request: Request, count: int, weak: LatentDiffusion | None = None) -> Options:
    from ldm.generate import Sizes
    from ldm.guidance import Guidance

    guidance = Guidance(
        request.guidance_scale,
        request.guidance_rescale,
        request.guidance_interval,
        None if weak is None else weak.unet,
    )
    options: Options = {
        "seeds": range(request.seed, request.seed + count),
        "guidance": guidance,
        "sampler": request.sampler,
        "steps": request.steps,
        "batch_size": request.batch_size,
        "sizes": Sizes(request.original_size, request.crop, aesthetic_score=request.aesthetic_score),
    }
    if request.spacing is not None:
        options["spacing"] = request.spacing  # type: ignore[typeddict-item]
    if request.negative_prompts:
        options["negative_prompts"] = _repeated(request.negative_prompts, count)
    for name in ("eta", "threshold", "max_pixels", "progress"):
        if getattr(request, name) is not None:
            options[name] = getattr(request, name)
    return options


def _noise_level(request: Request) -> Any:
    return {} if request.noise_level is None else {"noise_level": request.noise_level}


# -- what is given -----------------------------------------------------------------------------------------------------


def _repeated(given: Sequence[str], count: int) -> list[str]:
    """Each of them equally often, one after another; one for all."""
    if not given:
        return []
    if count % len(given):
        raise UsageError(f"{len(given)} of one kind for {count} pictures: give one for each prompt or image, or one")
    return [each for each in given for _ in range(count // len(given))]


def _spread(images: Tensor, count: int) -> Tensor:
    if count % len(images):
        raise UsageError(f"{len(images)} images for {count} pictures: give one for each prompt, or one for all")
    return images.repeat_interleave(count // len(images), dim=0)


def _read(files: Sequence[Path], mode: str) -> Tensor | None:
    """Uint8 [N, H, W, 1 or 3]; None for no files."""
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    images = []
    for file in files:
        try:
            with Image.open(file) as image:
                images.append(torch.from_numpy(np.array(image.convert(mode))))
        except (OSError, UnidentifiedImageError) as error:
            raise UsageError(f"{file} can't be read as an image: {error}") from error
        if images[-1].shape != images[0].shape:
            sizes = [f"{each.shape[1]}x{each.shape[0]}" for each in (images[0], images[-1])]
            raise UsageError(f"{files[0]} is {sizes[0]}, {file} {sizes[1]}: images must be of one size")
    if not images:
        return None
    stacked = torch.stack(images)
    return stacked if stacked.ndim == 4 else stacked[..., None]


def _check(request: Request) -> None:
    """What can be told before anything is loaded."""
    import torch

    if request.dtype not in DTYPES:
        raise UsageError(f"--dtype {request.dtype}: must be one of {', '.join(DTYPES)}")
    kind, _, number = request.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (number and not number.isdecimal()):
        raise UsageError(f"--device {request.device}: must be auto, cpu, cuda, or cuda:NUMBER")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {request.device}: this machine has {torch.cuda.device_count()} CUDA devices")
    if not 0 <= request.seed < LARGEST_SEED:
        raise UsageError(f"--seed {request.seed}: must be from 0 to below 2^63")
    if request.refine_from != Request.refine_from and request.refiner is None:
        raise UsageError("--refine-from without --refiner: leave it out")


def _check_places(out: Path, grid: Path | None) -> None:
    for option, folder in (("--out", out), ("--grid", None if grid is None else grid.parent)):
        existing = next((each for each in (folder, *folder.parents) if each.exists()), folder) if folder else None
        if existing is not None and not existing.is_dir():
            raise UsageError(f"{option}: {existing} is no folder")
    if grid is not None and grid.is_dir():
        raise UsageError(f"--grid {grid}: is a folder, give a file")


def _refuse(request: Request, reason: str, *names: str) -> None:
    for name in names:
        if getattr(request, name) not in (None, ()) and getattr(request, name) != []:
            raise UsageError(f"{OPTIONS[name]} with {request.model}: leave it out, {reason}")


def _facts(request: Request, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What a picture is made with."""
    facts: dict[str, Any] = {
        "model": hashes[request.model],
        "sampler": request.sampler,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
    }
    default = Request(request.model)
    facts |= {name: getattr(request, name) for name in SHOWN if getattr(request, name) != getattr(default, name)}
    if request.weak is not None:
        facts["weak"] = hashes[request.weak]
    if request.refiner is not None:
        facts |= {"refiner": hashes[request.refiner], "refine_from": request.refine_from}
    if request.upscalers:
        facts["upscalers"] = [hashes[name] for name in request.upscalers]
    return facts
