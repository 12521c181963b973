"""All that is decided before a model is loaded: what is made with what, how it is sampled, and what can't be had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ldm.errors import ConfigError, InputError
from ldm.generate.options import GUIDANCE_SCALE, MAX_PIXELS, STEPS, Options
from ldm.generate.run import check_handover, latent_shape, sampling_of
from ldm.generate.tasks import NOISE_LEVEL
from ldm.model import LatentDiffusion
from ldm.samplers import SAMPLERS, Levels, SamplerOptions, Spacing, get_sampler
from ldm.tiling import largest_tile
from pipelines.commands.sample.given import Given
from pipelines.commands.sample.models import Found, RecipeSampling
from pipelines.commands.sample.outline import Outline
from pipelines.commands.sample.request import Request
from pipelines.errors import UsageError
from pipelines.recipe.plugins import plugin_of

Task = Literal["text", "image", "inpaint", "upscale", "vary"]
STRENGTH: dict[str, float] = {"image": 0.6, "inpaint": 1.0}
"""How much of an image is made anew unless asked otherwise."""
REFINE_FROM = 0.8
ASKED, DEFAULT = "as asked", "by default"


@dataclass(frozen=True)
class Way:
    """How one model is sampled."""

    sampler: str
    spacing: Spacing | None
    options: SamplerOptions
    levels: Levels
    calls: int
    """Calls of the network, for each batch of pictures."""
    told: Sequence[tuple[str, str]]
    """Sampler and spacing in words, and who says so."""

    @property
    def words(self) -> str:
        return ", ".join(words for words, _ in self.told)


@dataclass(frozen=True)
class Plan:
    """How the pictures of a request are made."""

    task: Task
    steps: int
    guidance_scale: float
    strength: float | None
    """Strength of `--image`. None: nothing is begun from an image."""
    noise_level: int | None
    """Noise level of what is made larger. None: nothing is made larger."""
    refine_from: float
    ways: Mapping[str, Way]
    """The way of each model, by MODEL, as it was given."""
    told: Sequence[str]
    """Lines for people: how each model is sampled, and who says so."""

    def options(self, request: Request) -> Options:
        """Options of sampling, as `ldm.generate` takes them: what was asked for, and else each model's own."""
        options: Options = {"steps": self.steps}
        if request.sampler is not None:
            options["sampler"] = request.sampler
        if request.spacing is not None:
            options["spacing"] = request.spacing  # type: ignore[typeddict-item]
        for name in ("eta", "threshold", "max_pixels"):
            if getattr(request, name) is not None:
                options[name] = getattr(request, name)
        return options


def planned(request: Request, given: Given, outlines: Mapping[str, Outline], found: Mapping[str, Found]) -> Plan:
    """Raises `UsageError` naming the option that the models, or the rest of the request, don't allow."""
    main = outlines[request.model]
    task = _task(request, given, main)
    _check_models(request, task, outlines)
    for name in (request.model, *request.upscalers):
        with of("--max-pixels"):
            largest_tile(outlines[name].model.autoencoder, request.max_pixels or MAX_PIXELS)
    recipe = found[request.model].sampling
    steps, scale = request.steps, request.guidance_scale
    if steps is None:
        steps = recipe.steps if recipe else STEPS
    if scale is None:
        scale = recipe.guidance_scale if recipe else GUIDANCE_SCALE
    if scale == 1:
        why = "" if request.guidance_scale is not None else ", as the recipe has it"
        reason = f"nothing is guided with --guidance-scale 1{why}; take another scale"
        request.refuse(reason, "negative_prompts", "guidance_rescale", "guidance_interval", "weak")
        if any(picture.negative_prompt is not None for picture in given.pictures):
            raise UsageError(f"--prompts-file has negative prompts: leave them out, {reason}")
    if request.weak is not None and any(picture.negative_prompt is not None for picture in given.pictures):
        raise UsageError("--prompts-file has negative prompts: leave them out, --weak takes their place")
    strength = (request.strength or STRENGTH[task]) if task in STRENGTH else None
    _check_size(request, given, task, main.model)
    sampled = [name for name in (request.model, request.refiner, *request.upscalers) if name is not None]
    ways = {
        name: _way(request, name, outlines[name].model, steps, recipe if name == request.model else None)
        for name in sampled
    }
    refine_from = REFINE_FROM if request.refine_from is None else request.refine_from
    _check_parts(request, strength, refine_from, ways)
    upscales = main.upscales or bool(request.upscalers)
    return Plan(
        task,
        steps,
        scale,
        strength,
        (NOISE_LEVEL if request.noise_level is None else request.noise_level) if upscales else None,
        refine_from,
        ways,
        _told(request, ways, steps, scale, recipe),
    )


@contextmanager
def of(option: str) -> Iterator[None]:
    """What the library says is wrong, with the option that asked for it in front."""
    try:
        yield
    except (ConfigError, InputError) as error:
        raise UsageError(f"{option}: {error}") from error


def apply_recipe(model: LatentDiffusion, recipe: RecipeSampling | None) -> None:
    """Have the model sample of itself as the recipe does that released it: its sampler, and no finer choices."""
    if recipe is not None:
        model.sampler, model.spacing, model.sampler_options = recipe.sampler, None, SamplerOptions()


# -- what is made, by which models -------------------------------------------------------------------------------------


def _task(request: Request, given: Given, main: Outline) -> Task:
    if main.varies:
        names = ("prompts", "prompts_file", "negative_prompts", "masks", "strength", "refiner", "upscalers")
        request.refuse(f"{request.model} varies images", *names, "long_prompts")
        if given.images is None:
            raise UsageError(f"--image is missing: {request.model} varies images, and reads no prompts")
        return "vary"
    if not (request.prompts or request.prompts_file):
        raise UsageError("--prompt is missing: give it once for each picture, or --prompts-file")
    if main.upscales:
        request.refuse(f"{request.model} makes images larger", "masks", "strength", "size", "weak")
        if given.images is None:
            raise UsageError(f"--image is missing: {request.model} makes images larger")
        return "upscale"
    if given.images is None:
        return "text"
    request.refuse("pictures are as large as --image", "size")
    return "image" if given.masks is None else "inpaint"


def _check_models(request: Request, task: Task, outlines: Mapping[str, Outline]) -> None:
    main = outlines[request.model].model
    taken, latents = main.unet.config.in_channels, main.latent_channels
    fitting = {"inpaint": (latents, 2 * latents + 1), "upscale": (latents + 3,)}.get(task, (latents,))
    if taken not in fitting:
        kind = "inpainting: give --image and --mask" if taken == 2 * latents + 1 else "another task"
        raise UsageError(f"MODEL {request.model}: its network takes {taken} channels, it was made for {kind}")
    for name in request.upscalers:
        if not outlines[name].upscales:
            raise UsageError(f"--upscaler {name}: the model is no upscaler")
    if not (outlines[request.model].upscales or request.upscalers):
        request.refuse("no model here makes images larger", "noise_level")
    for name in (request.model, *request.upscalers):
        most = outlines[name].model.max_noise_level
        if outlines[name].upscales and request.noise_level is not None and request.noise_level > most:
            raise UsageError(f"--noise-level {request.noise_level}: {name} takes from 0 to {most}")
    if request.refiner is not None:
        refiner = outlines[request.refiner]
        if refiner.varies or refiner.model.unet.config.in_channels != refiner.model.latent_channels:
            raise UsageError(f"--refiner {request.refiner}: was made for another task")
        with of(f"--refiner {request.refiner}"):
            check_handover(main, refiner.model)
    if request.weak is not None:
        _check_weak(request, outlines)
    sized = [name for name, each in outlines.items() if each.model.unet.config.takes_pooled and name != request.weak]
    if not sized:
        request.refuse("no model here takes sizes", "original_size", "crop", "aesthetic_score")
    elif not any(outlines[name].model.aesthetics_score for name in sized):
        request.refuse("no model here takes a score", "aesthetic_score")


SCALES = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Keys of a first stage that say what a network's latents are of its own."""


def _check_weak(request: Request, outlines: Mapping[str, Outline]) -> None:
    """That both networks answer the same question: the same latents, process and conditions."""
    main, weak = (outlines[name].model for name in (request.model, str(request.weak)))
    keys = ("in_channels", "cross_attention_dim", "projection_class_embeddings_input_dim", "num_class_embeds")
    pairs = [(key, getattr(main.unet.config, key), getattr(weak.unet.config, key)) for key in keys]
    pairs += [(key, *(getattr(each.autoencoder.config, key) for each in (main, weak))) for key in SCALES]
    pairs += [("process", main.diffusion.config, weak.diffusion.config)]
    for key, ours, theirs in pairs:
        if ours != theirs:
            said = "process or prediction" if key == "process" else f"{key} {theirs}"
            raise UsageError(f"--weak {request.weak}: its {said} is not that of {request.model}")


def _check_size(request: Request, given: Given, task: Task, main: LatentDiffusion) -> None:
    if task in STRENGTH:
        with of(f"--image {request.images[0]}"):
            latent_shape(main, given.size)
    elif task != "upscale":
        with of("--size"):
            latent_shape(main, request.size)


# -- how they are sampled ----------------------------------------------------------------------------------------------


def _way(request: Request, name: str, model: LatentDiffusion, steps: int, recipe: RecipeSampling | None) -> Way:
    asked: Options = {"steps": steps}
    if request.sampler is not None:
        asked["sampler"] = request.sampler
    if request.spacing is not None:
        asked["spacing"] = request.spacing  # type: ignore[typeddict-item]
    sampler, spacing, finer = sampling_of(model, asked)
    if sampler not in SAMPLERS and request.sampler is None and recipe is not None:
        raise UsageError(
            f"--sampler is missing: the recipe's is {sampler!r}, of a plugin: give another, or the recipe as MODEL"
        )
    if request.sampler is None and recipe is not None:
        plugin = plugin_of("sampler", sampler)
        if (None if plugin is None else plugin.sha256) != recipe.plugin_sha256:
            raise UsageError(
                f"--sampler is missing: the release's is {sampler!r} of a plugin that has another text by now; give the"
                f" one that there is (--sampler {sampler}) or another, or release the model anew"
            )
    with of("--sampler"):
        method = get_sampler(sampler, options=finer)
    if request.eta is not None:
        with of("--eta"):
            get_sampler(sampler, request.eta)
    wrong = " and ".join(f"--{key} {value}" for key, value in asked.items()) if len(asked) > 1 else f"--steps {steps}"
    with of(f"{wrong}, {name}"):
        levels = method.levels_of(model.diffusion, steps, spacing, 1)
    own = "the recipe's" if recipe is not None else DEFAULT if model.sampler is None else "the folder's"
    told = [(sampler, own if request.sampler is None else ASKED)]
    if spacing is not None:
        told.append((f"{spacing} spacing", "the folder's" if request.spacing is None else ASKED))
    if request.eta is not None:
        told.append((f"eta {request.eta:g}", ASKED))
    return Way(sampler, spacing, finer or SamplerOptions(), levels, method.calls(levels), told)


def _check_parts(request: Request, strength: float | None, refine_from: float, ways: Mapping[str, Way]) -> None:
    """That a part of the steps, or two, are not none; and that a refiner goes on at the noise where the model ends."""
    levels = ways[request.model].levels
    if strength is not None and strength < 1:
        with of("--strength"):
            levels.from_strength(strength)
    if request.refiner is None:
        return
    with of("--refine-from"):
        before, after = levels.split(refine_from)[0], ways[request.refiner].levels.split(refine_from)[1]
    ours, theirs = before.levels[-1], after.levels[0]
    if abs(ours.noise_share - theirs.noise_share) > 1e-6 or abs(ours.alpha - theirs.alpha) > 1e-6:
        ways_of = [f"{name} ({ways[name].words})" for name in (request.refiner, request.model)]
        raise UsageError(
            f"--refiner {ways_of[0]}: begins at other noise than {ways_of[1]} ends with: give --sampler and --spacing,"
            " for both"
        )


def _told(
    request: Request, ways: Mapping[str, Way], steps: int, scale: float, recipe: RecipeSampling | None
) -> list[str]:
    """ "sampling: euler (the folder's); 20 steps, guidance scale 3 (by default)", and a line of each other model."""
    own = DEFAULT if recipe is None else "the recipe's"
    numbers = [
        (f"{steps} steps", own if request.steps is None else ASKED),
        (f"guidance scale {scale:g}", own if request.guidance_scale is None else ASKED),
    ]
    main = f"sampling: {_grouped([*ways[request.model].told, *numbers])}"
    others = {name: way for name, way in ways.items() if name != request.model}
    return [main, *(f"sampling of {name}: {_grouped(way.told)}" for name, way in others.items())]


def _grouped(parts: Sequence[tuple[str, str]]) -> str:
    groups: dict[str, list[str]] = {}
    for words, whose in parts:
        groups.setdefault(whose, []).append(words)
    return "; ".join(f"{', '.join(words)} ({whose})" for whose, words in groups.items())
