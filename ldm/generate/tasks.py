"""What a model can be asked for. All give uint8 images [N, H, W, 3] on the CPU, take `Options`, and raise

- `InputError` for prompts, images, seeds or noise that don't fit,
- `ConfigError` for an unknown sampler, an impossible number of steps, a task that the model wasn't made for,
- `GenerationError` if the result is not numbers.

Each picture's noise comes from its own seed, so that it doesn't depend on the batch that it is made in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.diffusion import Diffusion
from ldm.errors import ConfigError, InputError
from ldm.generate.options import Options
from ldm.generate.run import (
    Work,
    check_handover,
    encode_images,
    generate,
    latent_shape,
    latents_of,
    part_of,
    pixels_of,
    start,
    text_conditions,
)
from ldm.model import LatentDiffusion
from ldm.sampling import draw_of

NOISE_LEVEL = 20


def text_to_image(
    model: LatentDiffusion,
    prompts: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    noise: Tensor | None = None,
    refiner: LatentDiffusion | None = None,
    refine_from: float = 0.8,
    **options: Unpack[Options],
) -> Tensor:
    """Pictures of prompts.

    `size` is (height, width) in pixels, the model's own if None. `noise` [N, C, h, w] takes the place of seeds. A
    `refiner`, made for the same latents, takes over after the share `refine_from` of the process, where little noise is
    left (Podell et al. 2023, section 2.5).
    """
    shape = (
        tuple(noise.shape[2:]) if noise is not None and noise.ndim == 4 and size is None else latent_shape(model, size)
    )
    drawn, generators = start(model, len(prompts), options, shape=(shape[0], shape[1]), noise=noise)
    factor = model.autoencoder.config.downsampling
    size_px = (shape[0] * factor, shape[1] * factor)
    work = Work(drawn, text_conditions(model, prompts, options, size_px), generators)
    if refiner is None:
        return generate(model, work, options)
    check_handover(model, refiner)
    noised = latents_of(model, replace(work, end=refine_from), _halved(options, 0))
    refining = Work(noised, text_conditions(refiner, prompts, options, size_px), generators, begin=refine_from)
    return generate(refiner, refining, _halved(options, 1))


def conditions_to_image(
    model: LatentDiffusion,
    conditions: Conditioning | Sequence[Conditioning],
    empty: Conditioning | None = None,
    *,
    size: tuple[int, int] | None = None,
    noise: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Pictures of conditions by any encoder, N rows each: sounds, images, several of them joined
    (`ldm.conditioning.joint`), or several with a scale of guidance for each (`Guidance.scale`).

    `empty` is what guidance goes away from, of one row or N.
    """
    if "negative_prompts" in options:
        raise InputError("negative prompts beside conditions: encode them, and give them as empty")
    several = [conditions] if isinstance(conditions, Conditioning) else list(conditions)
    if not several or any(len(each) != len(several[0]) for each in several):
        raise InputError(f"conditions of {[len(each) for each in several]} rows: give at least one, of equal rows")
    count = len(several[0])
    shape = latent_shape(model, size) if noise is None or size is not None or noise.ndim != 4 else _sides(noise)
    drawn, generators = start(model, count, options, shape=shape, noise=noise)
    away = empty.expand(count) if empty is not None and len(empty) == 1 else empty

    def rows_of(rows: slice) -> tuple[list[Conditioning], Conditioning | None]:
        return [each[rows] for each in several], None if away is None else away[rows]

    return generate(model, Work(drawn, rows_of, generators), options)


def image_to_image(
    model: LatentDiffusion,
    prompts: Sequence[str],
    images: Tensor,
    *,
    strength: float = 0.6,
    noise: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Pictures of prompts that begin from images (Meng et al. 2022): the last `strength` of the steps are made anew.

    `images` are uint8 [N or 1, H, W, 3]. A refiner refines finished pictures this way, with a strength of about 0.3.
    """
    pixels = pixels_of(images, len(prompts), model.autoencoder.config.downsampling)
    x0 = encode_images(model, pixels)
    drawn, generators = start(model, len(prompts), options, shape=_sides(x0), noise=noise)
    conditions = text_conditions(model, prompts, options, _sides(pixels))
    return generate(model, Work(drawn, conditions, generators, x0, strength), options)


def inpaint(
    model: LatentDiffusion,
    prompts: Sequence[str],
    images: Tensor,
    masks: Tensor,
    *,
    strength: float = 1.0,
    noise: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Images with a part made anew, after prompts.

    `images` are uint8 [N or 1, H, W, 3], `masks` bool [N or 1, H, W], true where to make anew. A U-Net with channels
    for mask and masked image (Rombach et al. 2022, section 4.5) is given these; with any other, what stays is put back
    after each step. What stays is decoded from latents, and so not equal to the bit.
    """
    count = len(prompts)
    pixels = pixels_of(images, count, model.autoencoder.config.downsampling)
    anew = _masks(masks, pixels)
    x0 = encode_images(model, pixels)
    small = F.interpolate(anew, _sides(x0), mode="nearest")
    drawn, generators = start(model, count, options, shape=_sides(x0), noise=noise)
    begun_from = x0 if strength < 1 else None
    work = Work(drawn, text_conditions(model, prompts, options, _sides(pixels)), generators, begun_from, strength)
    channels, latent = model.unet.config.in_channels, model.latent_channels
    if channels == latent:
        return generate(model, replace(work, kept=(x0, small)), options)
    if channels != 2 * latent + 1:
        raise ConfigError(f"a U-Net of {channels} channels can't inpaint: must be {latent}, or {2 * latent + 1}")
    hidden = encode_images(model, pixels * (1 - anew))
    return generate(model, replace(work, extra=torch.cat([small, hidden], dim=1)), options)


def image_variations(
    model: LatentDiffusion,
    images: Tensor,
    *,
    size: tuple[int, int] | None = None,
    noise: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Pictures like images, uint8 [N, H, W, 3]: the model's image encoder takes the place of a text encoder."""
    encoder = model.image_encoder
    if encoder is None:
        raise ConfigError("the model has no image encoder: variations need one that was trained with images")
    if "negative_prompts" in options:
        raise InputError("negative prompts for a model that reads images: leave them out")
    count = len(images)
    drawn, generators = start(model, count, options, shape=latent_shape(model, size), noise=noise)

    def conditions(rows: slice) -> tuple[Conditioning, Conditioning]:
        towards = encoder.encode(images[rows])
        return towards, encoder.null(len(towards))

    return generate(model, Work(drawn, conditions, generators), options)


def upscale(
    model: LatentDiffusion,
    prompts: Sequence[str],
    images: Tensor,
    *,
    noise_level: int = NOISE_LEVEL,
    noise: Tensor | None = None,
    low_res_noise: Tensor | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """Images larger by the first stage's factor: 4 for Stable Diffusion's upscaler.

    `images` are uint8 [N or 1, h, w, 3]. The U-Net is given them beside the latents, noised to `noise_level`, which it
    is told (Ho et al. 2022, section 4.2): more noise leaves it more freedom. `low_res_noise` [N, 3, h, w] takes the
    place of what the seeds draw after the latents' noise.
    """
    low_res = _upscaling(model)
    if not 0 <= noise_level <= model.max_noise_level:
        raise InputError(f"noise_level = {noise_level}: must be from 0 to {model.max_noise_level}")
    count = len(prompts)
    pixels = pixels_of(images, count, 1).float()
    drawn, generators = start(model, count, options, shape=_sides(pixels), noise=noise)
    if low_res_noise is None:
        if generators is None:
            raise InputError("noise without low_res_noise: give both, or seeds")
        low_res_noise = draw_of(generators, pixels)()
    if low_res_noise.shape != pixels.shape:
        raise InputError(f"low_res_noise is {tuple(low_res_noise.shape)}: must be {tuple(pixels.shape)}")
    level = torch.full((count,), noise_level)
    noised = low_res.noised(pixels, low_res_noise, level)
    factor = model.autoencoder.config.downsampling
    of_text = text_conditions(model, prompts, options, (factor * pixels.shape[-2], factor * pixels.shape[-1]))

    def conditions(rows: slice) -> tuple[Conditioning, Conditioning]:
        towards, away = (replace(each, noise_level=level[rows].to(each.context.device)) for each in of_text(rows))
        return towards, away

    return generate(model, Work(drawn, conditions, generators, extra=noised), options)


def cascade(
    models: Sequence[LatentDiffusion],
    prompts: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    noise_level: int = NOISE_LEVEL,
    **options: Unpack[Options],
) -> Tensor:
    """Pictures by the first model, made larger by each of the others (Ho et al. 2022, "Cascaded diffusion models")."""
    if not models:
        raise ConfigError("a cascade of no models: give at least one")
    for upscaler in models[1:]:
        _upscaling(upscaler)
    images: Tensor | None = None
    for index, model in enumerate(models):
        own = options.copy()
        if progress := part_of(options.get("progress"), index, len(models)):
            own["progress"] = progress
        if images is None:
            images = text_to_image(model, prompts, size=size, **own)
        else:
            images = upscale(model, prompts, images, noise_level=noise_level, **own)
    assert images is not None
    return images


def _upscaling(model: LatentDiffusion) -> Diffusion:
    """The process that noises its low-resolution image. Raises `ConfigError` if it is no upscaler."""
    if model.low_res_diffusion is None or model.unet.config.in_channels != model.latent_channels + 3:
        raise ConfigError("the model is no upscaler: it needs a low-resolution process, and 3 more channels")
    return model.low_res_diffusion


def _sides(maps_BCHW: Tensor) -> tuple[int, int]:
    return maps_BCHW.shape[-2], maps_BCHW.shape[-1]


def _masks(masks: Tensor, pixels_NCHW: Tensor) -> Tensor:
    """Float32 [N, 1, H, W]: 1 where to make anew."""
    wanted = tuple(pixels_NCHW.shape[-2:])
    if masks.ndim != 3 or masks.dtype != torch.bool or tuple(masks.shape[1:]) != wanted:
        raise InputError(f"masks are {masks.dtype} {tuple(masks.shape)}: must be bool [{len(pixels_NCHW)}, *{wanted}]")
    if len(masks) not in (1, len(pixels_NCHW)):
        raise InputError(f"{len(masks)} masks for {len(pixels_NCHW)} pictures: give one for each, or one for all")
    return masks[:, None].float().expand(len(pixels_NCHW), -1, -1, -1)


def _halved(options: Options, half: int) -> Options:
    """The options with progress of one of two halves."""
    own = options.copy()
    if progress := part_of(options.get("progress"), half, 2):
        own["progress"] = progress
    return own
