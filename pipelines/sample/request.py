"""What `ldm sample` is asked for, and the pictures of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.sample.errors import UsageError
from pipelines.sample.models import hash_of, load, resolve_model

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.diffusion import Prediction
    from ldm.generate import LatentDiffusion, Options

Progress = Callable[[int, int], None]
DTYPES = ("float32", "bfloat16", "float16")
COLUMNS = 8
OPAQUE = 127
"""Grey levels of a mask above this are made anew."""


@dataclass(frozen=True)
class Request:
    """One call of `ldm sample`. Names are those of its options."""

    model: str
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
    batch_size: int = 16
    long_prompts: str = "cut"
    device: str = "auto"
    dtype: str = "float32"
    prediction: Prediction | None = None
    allow_pickle: bool = False
    progress: Progress | None = field(default=None, compare=False)


def sample(request: Request, out: Path, grid: Path | None) -> list[Path]:
    """Write one PNG a picture into `out`, and `grid` if given; the paths written. Each file says how it was made.

    Raises `UsageError` for what can't be asked for, `ldm.errors.LdmError` for what the models can't do.
    """
    from ldm.images import image_grid, save_png

    path = resolve_model(request.model)
    pictures = made(request, path)
    prompts = _repeated(request.prompts, len(pictures))
    facts = _facts(request, path)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for index, image in enumerate(pictures):
        file = out / f"{index:05d}.png"
        own = {"prompt": prompts[index]} if prompts else {}
        save_png(image, file, facts | own | {"seed": request.seed + index})
        written.append(file)
    if grid is not None:
        grid.parent.mkdir(parents=True, exist_ok=True)
        save_png(image_grid(pictures, columns=min(COLUMNS, len(pictures))), grid, facts)
        written.append(grid)
    return written


def made(request: Request, path: Path) -> Tensor:
    """The pictures, uint8 [N, H, W, 3]: by the task that the model and what it is given make."""
    from ldm import generate

    model = _loaded(request, path)
    images, masks = (_read(files, mode) for files, mode in ((request.images, "RGB"), (request.masks, "L")))
    if model.image_encoder is not None:
        _refuse(request, {"prompts": "--prompt", "masks": "--mask", "strength": "--strength"}, "it varies images")
        if images is None:
            raise UsageError(f"{request.model} varies images and reads no prompts: give --image")
        images = images.repeat_interleave(request.count, dim=0)
        return generate.image_variations(model, images, size=request.size, **_options(request, len(images)))
    if not request.prompts:
        raise UsageError("no prompts: give --prompt, once for each picture")
    count = max(len(request.prompts), 0 if images is None else len(images)) * request.count
    prompts, options = _repeated(request.prompts, count), _options(request, count)
    if images is None:
        _refuse(request, {"masks": "--mask", "strength": "--strength"}, "no image is given")
        if model.low_res_diffusion is not None:
            raise UsageError(f"{request.model} makes images larger: give --image")
        refiner = None if request.refiner is None else _loaded(request, resolve_model(request.refiner))
        pictures = generate.text_to_image(
            model, prompts, size=request.size, refiner=refiner, refine_from=request.refine_from, **options
        )
    else:
        _refuse(request, {"size": "--size", "refiner": "--refiner"}, "an image is given")
        pictures = _of_images(model, prompts, _spread(images, count), masks, request, options)
    for upscaler in request.upscalers:
        larger = _loaded(request, resolve_model(upscaler))
        pictures = generate.upscale(larger, prompts, pictures, **_noise_level(request), **options)
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
        _refuse(request, {"masks": "--mask", "strength": "--strength"}, "it makes images larger")
        return generate.upscale(model, prompts, images, **_noise_level(request), **options)
    given: Any = {} if request.strength is None else {"strength": request.strength}
    if masks is None:
        return generate.image_to_image(model, prompts, images, **given, **options)
    anew = _spread(masks[..., 0] > OPAQUE, len(prompts))
    return generate.inpaint(model, prompts, images, anew, **given, **options)


# -- models ------------------------------------------------------------------------------------------------------------


def _loaded(request: Request, path: Path) -> LatentDiffusion:
    import torch

    from ldm.interchange.encoders import text_parts

    if request.dtype not in DTYPES:
        raise UsageError(f"--dtype {request.dtype}: must be one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, request.dtype)
    model = load(path, dtype, prediction=request.prediction, allow_pickle=request.allow_pickle)
    if request.long_prompts != "cut":
        for encoder in text_parts(model.text_encoder).values():
            encoder.long_prompts = request.long_prompts  # type: ignore[assignment]
    device = request.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: this machine has no CUDA device; use cpu or auto")
    return model.to(device).for_inference()


def _options(request: Request, count: int) -> Options:
    from ldm.guidance import Guidance

    weak = None if request.weak is None else _loaded(request, resolve_model(request.weak)).unet
    options: Options = {
        "seeds": range(request.seed, request.seed + count),
        "guidance": Guidance(request.guidance_scale, request.guidance_rescale, request.guidance_interval, weak),
        "sampler": request.sampler,
        "steps": request.steps,
        "batch_size": request.batch_size,
    }
    if request.spacing is not None:
        options["spacing"] = request.spacing  # type: ignore[typeddict-item]
    if request.eta is not None:
        options["eta"] = request.eta
    if request.threshold is not None:
        options["threshold"] = request.threshold
    if request.negative_prompts:
        options["negative_prompts"] = _repeated(request.negative_prompts, count)
    if request.progress is not None:
        options["progress"] = request.progress
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


def _refuse(request: Request, options: Mapping[str, str], reason: str) -> None:
    for name, option in options.items():
        if getattr(request, name) not in (None, ()) and getattr(request, name) != []:
            raise UsageError(f"{option} with {request.model}: leave it out, {reason}")


def _facts(request: Request, path: Path) -> dict[str, Any]:
    """What a picture is made with: whatever is not left as it is."""
    facts: dict[str, Any] = {
        "model": hash_of(path),
        "sampler": request.sampler,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
    }
    default = Request(request.model)
    for name in (
        *("guidance_rescale", "guidance_interval", "spacing", "eta", "threshold", "strength", "noise_level"),
        *("long_prompts", "dtype", "negative_prompts"),
    ):
        if getattr(request, name) != getattr(default, name):
            facts[name] = getattr(request, name)
    for name in ("weak", "refiner"):
        if getattr(request, name) is not None:
            facts[name] = hash_of(resolve_model(getattr(request, name)))
    if request.upscalers:
        facts["upscalers"] = [hash_of(resolve_model(each)) for each in request.upscalers]
    return facts
