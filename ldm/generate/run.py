"""What all tasks share: batches, conditions, sampling, decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldm.autoencoder import AutoencoderKL, IdentityAutoencoder
from ldm.conditioning import Conditioning
from ldm.errors import ConfigError, GenerationError, InputError
from ldm.generate.options import BATCH_SIZE, GUIDANCE_SCALE, MAX_PIXELS, SAMPLER, STEPS, Options, Sizes
from ldm.guidance import Guidance
from ldm.latents import pixels_from_uint8, pixels_to_uint8, posterior_mean, scale_latents, unscale_latents
from ldm.model import LatentDiffusion
from ldm.samplers import After, Level, SamplerOptions, Spacing, get_sampler, unchanged
from ldm.sampling import Progress, sample_latents, seeded_start
from ldm.tiling import decode_in_parts, encode_in_parts, largest_tile

Conditions = Callable[[slice], tuple[Conditioning | Sequence[Conditioning], Conditioning | None]]
"""The conditions of some rows: what to go towards, one condition or several, and what to go away from."""
TextConditions = Callable[[slice], tuple[Conditioning, Conditioning]]


@dataclass(frozen=True)
class Work:
    """The pictures of a task, N rows each."""

    noise: Tensor
    """[N, C, h, w], standard normal; or latents that are noised already, where `begin` is above 0."""
    conditions: Conditions
    generators: Sequence[torch.Generator] | None = None
    """That drew the noise. None: see `ldm.sampling.sample_latents`."""
    x0: Tensor | None = None
    """[N, C, h, w], scaled latents to begin from."""
    strength: float = 1.0
    begin: float = 0.0
    end: float = 1.0
    extra: Tensor | None = None
    """[N, E, h, w], channels that go with the latents."""
    kept: tuple[Tensor, Tensor] | None = None
    """Scaled latents [N, C, h, w] of which some stay, and where: [N, 1, h, w], 0 there and 1 elsewhere."""


def generate(model: LatentDiffusion, work: Work, options: Options) -> Tensor:
    """Uint8 images [N, H, W, 3] on the CPU."""
    max_pixels = options.get("max_pixels", MAX_PIXELS)
    largest_tile(model.autoencoder, max_pixels)  # refuses before the work is done
    return torch.cat([decode_latents(model.autoencoder, part, max_pixels) for part in batches(model, work, options)])


def latents_of(model: LatentDiffusion, work: Work, options: Options) -> Tensor:
    """Scaled latents [N, C, h, w] on the CPU, still noised if the work ends before its end."""
    return torch.cat([part.cpu() for part in batches(model, work, options)])


def batches(model: LatentDiffusion, work: Work, options: Options) -> list[Tensor]:
    """Scaled latents, batch after batch.

    Raises `InputError` for an empty or impossible request, `ConfigError` for an unknown sampler or what can't be had
    together, `GenerationError` if the result is not numbers.
    """
    size = options.get("batch_size", BATCH_SIZE)
    if size < 1:
        raise InputError(f"batch_size = {size}: must be 1 or more")
    _check_channels(model, work)
    sampler, spacing, sampler_options = sampling_of(model, options)
    starts = range(0, len(work.noise), size)
    parts = []
    for index, start in enumerate(starts):
        rows = slice(start, start + size)
        towards, away = work.conditions(rows)
        x0, extra = (None if part is None else part[rows] for part in (work.x0, work.extra))
        latents = sample_latents(
            model.unet,
            model.diffusion,
            towards,
            away,
            work.noise[rows],
            guidance=_guidance(options),
            sampler=sampler,
            steps=options.get("steps", STEPS),
            spacing=spacing,
            eta=options.get("eta"),
            sampler_options=sampler_options,
            threshold=options.get("threshold"),
            x0_BCHW=x0,
            strength=work.strength,
            begin=work.begin,
            end=work.end,
            extra_channels_BCHW=extra,
            after=unchanged if work.kept is None else _keeping(model, work.kept, work.noise, rows),
            generators=None if work.generators is None else work.generators[rows],
            progress=part_of(options.get("progress"), index, len(starts)),
        )
        if work.kept is not None:  # some samplers end with a little noise
            x0, anew = (part[rows].to(latents) for part in work.kept)
            latents = anew * latents + (1 - anew) * x0
        parts.append(latents)
    return parts


# -- noise -------------------------------------------------------------------------------------------------------------


def start(
    model: LatentDiffusion,
    count: int,
    options: Options,
    *,
    shape: tuple[int, int],
    noise: Tensor | None = None,
) -> tuple[Tensor, list[torch.Generator] | None]:
    """Noise [count, C, *shape], from the seeds if not given, and the generators that drew it.

    Raises `InputError` for neither, another number of seeds, or noise that doesn't fit or isn't numbers.
    """
    wanted = (count, model.latent_channels, *shape)
    if noise is not None:
        if tuple(noise.shape) != wanted:
            raise InputError(f"noise is {tuple(noise.shape)}: must be {wanted}")
        if not bool(noise.isfinite().all()):
            raise InputError("noise has values that are not numbers")
        return noise, None
    seeds = options.get("seeds")
    if seeds is None:
        raise InputError("neither seeds nor noise: give one seed a picture")
    if len(seeds) != count or count == 0:
        raise InputError(f"{count} pictures and {len(seeds)} seeds: ask for at least one, and give one seed for each")
    return seeded_start(seeds, wanted[1:])


def latent_shape(model: LatentDiffusion, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the latents of an image of `size` pixels, or of the model's own.

    Raises `InputError` for a size that the first stage can't make.
    """
    factor = model.autoencoder.config.downsampling
    height, width = size or (model.unet.config.sample_size * factor,) * 2
    if height < factor or width < factor or height % factor or width % factor:
        raise InputError(f"size = {height}x{width} pixels: sides must be multiples of {factor}")
    return height // factor, width // factor


# -- conditions --------------------------------------------------------------------------------------------------------


def text_conditions(
    model: LatentDiffusion, prompts: Sequence[str], options: Options, size_px: tuple[int, int]
) -> TextConditions:
    """Prompts, and what guidance goes away from: negative prompts or the empty one. With sizes, where the network is
    conditioned on them.

    Raises `InputError` for no prompts, one that is not in a list, or another number of negative ones.
    """
    if isinstance(prompts, str):
        raise InputError(f"prompts = {prompts!r}: must be a list of them")
    prompts, negative = list(prompts), options.get("negative_prompts")
    if not prompts:
        raise InputError("no prompts: give at least one")
    if negative is not None and len(negative) != len(prompts):
        raise InputError(f"{len(prompts)} prompts and {len(negative)} negative prompts: give one for each, or none")

    def conditions(rows: slice) -> tuple[Conditioning, Conditioning]:
        towards = model.text_encoder.encode(prompts[rows])
        if negative is None:
            away = model.text_encoder.null(len(towards))
        else:
            away = model.text_encoder.encode(list(negative[rows]))
        if not model.unet.config.takes_pooled:
            return towards, away
        sizes = options.get("sizes", Sizes())
        numbers = (
            sizes_of(model, sizes, size_px, score) for score in (sizes.aesthetic_score, sizes.negative_aesthetic_score)
        )
        towards, away = (
            replace(each, sizes=row.expand(len(each), -1)) for each, row in zip((towards, away), numbers, strict=True)
        )
        return towards, away

    return conditions


def sizes_of(model: LatentDiffusion, sizes: Sizes, size_px: tuple[int, int], score: float) -> Tensor:
    """The numbers that the network takes, float32 [1, S]."""
    last = (score,) if model.aesthetics_score else (sizes.target or size_px)
    return torch.tensor([[*(sizes.original or size_px), *sizes.crop, *last]], dtype=torch.float32)


# -- images ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode_latents(
    autoencoder: AutoencoderKL | IdentityAutoencoder, scaled_BCHW: Tensor, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Uint8 images [B, H, W, 3] on the CPU, of scaled latents; at most `max_pixels` of them at a time.

    Raises `GenerationError` if the result is not numbers.
    """
    latents = unscale_latents(scaled_BCHW, autoencoder.config)
    pixels = decode_in_parts(autoencoder, latents, max_pixels)
    if not bool(pixels.isfinite().all()):
        raise GenerationError(
            f"decoding in {latents.dtype} gave pixels that are not numbers: check the weights; in float16, keep the"
            " autoencoder in float32"
        )
    return pixels_to_uint8(pixels).cpu()


@torch.no_grad()
def encode_images(model: LatentDiffusion, pixels_BCHW: Tensor, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Scaled latents float32 [B, C, h, w] on the CPU, of pixels in [-1, 1]: the posterior's means."""
    moments = encode_in_parts(model.autoencoder, pixels_BCHW.to(model.device), max_pixels)
    return scale_latents(posterior_mean(moments), model.autoencoder.config).float().cpu()


def pixels_of(images_NHWC: Tensor, count: int, factor: int) -> Tensor:
    """Pixels in [-1, 1] of `count` uint8 images, or of one for all.

    Raises `InputError` for another number of images, or sides that are no multiples of `factor`.
    """
    pixels = pixels_from_uint8(images_NHWC)
    if len(pixels) not in (1, count):
        raise InputError(f"{len(pixels)} images for {count} pictures: give one for each, or one for all")
    if pixels.shape[-2] % factor or pixels.shape[-1] % factor:
        raise InputError(
            f"images are {pixels.shape[-2]}x{pixels.shape[-1]} pixels: sides must be multiples of {factor}"
        )
    return pixels.expand(count, -1, -1, -1)


def part_of(progress: Progress | None, index: int, parts: int) -> Progress | None:
    """Progress of one part of several equal ones, as progress of the whole."""
    if progress is None:
        return None
    return lambda done, total: progress(index * total + done, parts * total)


def sampling_of(model: LatentDiffusion, options: Options) -> tuple[str, Spacing | None, SamplerOptions | None]:
    """Sampler, spacing and finer choices: what is asked for, else the model's own.

    Another sampler than the model's takes the model's spacing where it has it, and none of the finer choices.
    """
    name = options.get("sampler", model.sampler or SAMPLER)
    if name == model.sampler:
        return name, options.get("spacing", model.spacing), model.sampler_options
    if "spacing" in options or model.spacing is None:
        return name, options.get("spacing"), None
    try:
        get_sampler(name).levels_of(model.diffusion, options.get("steps", STEPS), model.spacing, 1)
    except ConfigError:
        return name, None, None
    return name, model.spacing, None


def check_handover(model: LatentDiffusion, refiner: LatentDiffusion) -> None:
    """Raises `ConfigError` unless a refiner can go on where the model ends: with the same latents, under the same
    process."""
    for name in ("latent_channels", "downsampling", "scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        ours, theirs = (getattr(each.autoencoder.config, name) for each in (model, refiner))
        if ours != theirs:
            raise ConfigError(f"the refiner's latents have {name} = {theirs}, the model's {ours}: must be equal")
    ours, theirs = (each.diffusion.config.process for each in (model, refiner))
    if ours != theirs:
        differing = ", ".join(
            f"{name} {ours[name]} (refiner {theirs[name]})" for name in ours if ours[name] != theirs[name]
        )
        raise ConfigError(f"the refiner goes through another process than the model: {differing}; must be equal")


def _check_channels(model: LatentDiffusion, work: Work) -> None:
    given = work.noise.shape[1] + (0 if work.extra is None else work.extra.shape[1])
    taken = model.unet.config.in_channels
    if given != taken:
        raise ConfigError(
            f"the U-Net takes {taken} channels, and this task gives it {given}: it was made for another task"
            " (inpainting needs image and mask, upscaling an image)"
        )


def _guidance(options: Options) -> Guidance | float:
    """Raises `ConfigError` for both kinds."""
    if "guidance" in options and "guidance_scale" in options:
        raise ConfigError("both guidance and guidance_scale: give one of them")
    return options.get("guidance", options.get("guidance_scale", GUIDANCE_SCALE))


def _keeping(model: LatentDiffusion, kept: tuple[Tensor, Tensor], noise: Tensor, rows: slice) -> After:
    """After each step, what is to stay is what it would be at that level (Lugmayr et al. 2022, eq. 8)."""
    x0, anew, drawn = (part[rows].to(model.device, torch.float32) for part in (*kept, noise))

    def after(x: Tensor, level: Level) -> Tensor:
        return anew * x + (1 - anew) * (level.alpha * x0 + level.sigma * drawn)

    return after
