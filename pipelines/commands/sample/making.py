"""Pictures of a plan, batch by batch: the models are loaded, and each task of `ldm.generate` is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ldm import generate
from ldm.conditioning.prompts import check_long_prompts
from ldm.errors import ConfigError, FolderError
from ldm.generate import LatentDiffusion, Options, Sizes
from ldm.guidance import Guidance
from ldm.interchange import load_model, load_single_file, merge_lora
from ldm.interchange.encoders import text_parts
from pipelines.commands.sample.given import Given, Picture
from pipelines.commands.sample.models import Found
from pipelines.commands.sample.plan import Plan, apply_recipe, of
from pipelines.commands.sample.request import Request
from pipelines.errors import UsageError

if TYPE_CHECKING:
    from ldm.diffusion import Prediction

Advance = Callable[[float], None]
"""Is told which share of a batch is done, 0 to 1."""


@dataclass(frozen=True)
class Models:
    """All that a request needs, loaded."""

    main: LatentDiffusion
    refiner: LatentDiffusion | None
    weak: LatentDiffusion | None
    upscalers: Sequence[LatentDiffusion]


def load_models(
    request: Request, found: Mapping[str, Found], ready: Mapping[str, LatentDiffusion] | None = None
) -> Models:
    """The models on their device, the LoRAs in the main one's weights. `ready` are those that have been read already,
    each for one use.

    Raises `ldm.errors.LdmError` if one can't be read, `UsageError` for a LoRA that doesn't fit.
    """
    left = dict(ready or {})

    def read(name: str) -> LatentDiffusion:
        return left.pop(name, None) or read_model(request, name, found)

    main = _placed(request, _with_loras(request, read(request.model)))
    others = {
        name: _placed(request, read(name))
        for name in dict.fromkeys((request.refiner, request.weak, *request.upscalers))
        if name is not None
    }
    return Models(
        main,
        None if request.refiner is None else others[request.refiner],
        None if request.weak is None else others[request.weak],
        [others[name] for name in request.upscalers],
    )


def read_model(request: Request, name: str, found: Mapping[str, Found]) -> LatentDiffusion:
    """One model on the CPU, which samples of itself as its folder says, or the recipe that released it."""
    path, dtype = found[name].path, getattr(torch, request.dtype)
    if path.is_dir():
        model = load_model(path, dtype, variant=request.variant, allow_pickle=request.allow_pickle)
    else:
        prediction = prediction_of(request, name)
        model = load_single_file(path, dtype=dtype, prediction=prediction, allow_pickle=request.allow_pickle)
    apply_recipe(model, found[name].sampling if name == request.model else None)
    return model


def prediction_of(request: Request, name: str) -> Prediction | None:
    """--prediction is of MODEL alone."""
    return request.prediction if name == request.model else None  # type: ignore[return-value]


def _with_loras(request: Request, model: LatentDiffusion) -> LatentDiffusion:
    for lora in request.loras:
        try:
            merge_lora(model, lora.file, lora.scale)
        except (ConfigError, FolderError) as error:
            raise UsageError(f"--lora: {error}") from error
    return model


def _placed(request: Request, model: LatentDiffusion) -> LatentDiffusion:
    if request.long_prompts is not None and model.image_encoder is None:
        for encoder in text_parts(model.text_encoder).values():
            with of("--long-prompts"):
                check_long_prompts(request.long_prompts, encoder.tokenizer)
            encoder.long_prompts = request.long_prompts  # type: ignore[assignment]
    device = request.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).for_inference()


def make(
    request: Request, plan: Plan, given: Given, models: Models, progress: Callable[[float, int], None]
) -> Iterator[tuple[list[Picture], Tensor]]:
    """Batches of pictures, with uint8 [N, H, W, 3] of each. `progress` is told how many batches are done, with the
    share of the one at work, and how many pictures."""
    made = 0
    for number, batch in enumerate(given.batches(request.batch_size)):

        def advance(share: float, number: int = number, made: int = made) -> None:
            progress(number + share, made)

        yield batch, _batch(request, plan, given, models, batch, advance)
        made += len(batch)


def _batch(
    request: Request, plan: Plan, given: Given, models: Models, batch: Sequence[Picture], advance: Advance
) -> Tensor:
    images, masks = (
        None if each is None else each[[getattr(picture, name) for picture in batch]]
        for name, each in (("image", given.images), ("mask", given.masks))
    )
    prompts = [picture.prompt or "" for picture in batch]
    stages = 1 + len(models.upscalers)
    options = _options(request, plan, batch, models.weak, _stage(advance, 0, stages))
    more: Any = {}
    if plan.task == "vary":
        assert images is not None
        return generate.image_variations(models.main, images, size=request.size, **options)
    if plan.task == "text":
        more = {"size": request.size, "refiner": models.refiner, "refine_from": plan.refine_from}
        pictures = generate.text_to_image(models.main, prompts, **more, **options)
    else:
        assert images is not None
        if plan.task == "upscale":
            pictures = generate.upscale(models.main, prompts, images, noise_level=plan.noise_level or 0, **options)
        elif masks is None:
            pictures = generate.image_to_image(models.main, prompts, images, strength=plan.strength or 1, **options)
        else:
            pictures = generate.inpaint(models.main, prompts, images, masks, strength=plan.strength or 1, **options)
    for stage, upscaler in enumerate(models.upscalers, 1):
        options = _options(request, plan, batch, None, _stage(advance, stage, stages))
        pictures = generate.upscale(upscaler, prompts, pictures, noise_level=plan.noise_level or 0, **options)
    return pictures


def _options(
    request: Request, plan: Plan, batch: Sequence[Picture], weak: LatentDiffusion | None, progress: Any
) -> Options:
    options = plan.options(request)
    options["seeds"] = [picture.seed for picture in batch]
    options["guidance"] = Guidance(
        plan.guidance_scale,
        request.guidance_rescale or 0.0,
        request.guidance_interval or (0.0, 1.0),
        None if weak is None else weak.unet,
    )
    options["batch_size"] = len(batch)
    sizes = Sizes(request.original_size, request.crop or (0, 0))
    if request.aesthetic_score is not None:
        sizes = Sizes(sizes.original, sizes.crop, aesthetic_score=request.aesthetic_score)
    options["sizes"] = sizes
    negatives = [picture.negative_prompt for picture in batch if picture.negative_prompt is not None]
    if negatives:
        options["negative_prompts"] = negatives
    options["progress"] = progress
    return options


def _stage(advance: Advance, stage: int, stages: int) -> Callable[[int, int], None]:
    return lambda done, total: advance((stage + done / total) / stages)


def hash_of(path: Path) -> str:
    """sha256 of a model's files, hex."""
    from ldm.interchange import model_hash
    from pipelines.artifacts import file_sha256

    return model_hash(path) if path.is_dir() else file_sha256(path)
