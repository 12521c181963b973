"""What of the models does not go together, as the recipe alone shows it: everything is built that training will build,
on the meta device, where it takes no memory, and whatever can't be built is told.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.conditioning.text import PACKAGED
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.errors import ConfigError
from ldm.guidance import Guidance
from ldm.interchange.schedulers import scheduler_config
from ldm.losses import POOL
from ldm.perceptual import LEAST_PX
from ldm.samplers import get_sampler
from ldm.unet import UNet2DCondition
from pipelines.recipe import AutoencoderModel, Block, ClipModel, Recipe, TextToImageModel
from pipelines.recipe.columns import Columns, ledger_columns
from pipelines.recipe.data_checks import check_split, stored_side_px
from pipelines.recipe.networks import autoencoder_config, clip_misfits, diffusion_config, unet_config
from pipelines.recipe.places import check_scheme
from pipelines.recipe.predicates import SCORED_BY
from pipelines.recipe.problems import Findings, listed, meant
from pipelines.recipe.references import is_path
from pipelines.recipe.weights import SCRATCH, config_of, shape_misfits, shipped_weights

Built = TypeVar("Built")
AnyBlock = TypeVar("AnyBlock", bound=Block)

ENCODER_SHAPES = {"minilm": (512, 384)}
"""Of the text encoders that come in packages: the most tokens, and the width of their states."""
SOME_WIDTH = 768
"""Of the states of an encoder that is not known here."""
SOME_SIDE = 8
"""Of latents whose size is not known here."""


def check_models(recipe: Recipe, findings: Findings) -> None:
    image = recipe.acquire.image
    size_px = stored_side_px(image, recipe.acquire.filter.min_side_px)
    columns = ledger_columns(recipe.source)
    for name, model in recipe.models.items():
        where = f"models.{name}"
        if isinstance(model, AutoencoderModel):
            _check_autoencoder(where, model, size_px, findings)
        elif isinstance(model, ClipModel):
            _check_clip(recipe, name, model, size_px, columns, findings)
        else:
            _check_text_to_image(recipe, name, model, size_px, findings)


# -- autoencoder -------------------------------------------------------------------------------------------------------


def _check_autoencoder(where: str, model: AutoencoderModel, size_px: int | None, findings: Findings) -> None:
    network = model.network
    factor = 1 << (len(network.block_out_channels) - 1)
    fits = size_px is None or _fits(where, size_px, factor, findings)
    config = None
    if _divides(f"{where}.network.norm_num_groups", network.norm_num_groups, network.block_out_channels, findings):
        config = _made(
            f"{where}.network",
            network,
            lambda block: autoencoder_config(
                model.model_copy(update={"network": block}), size_px if fits and size_px is not None else factor
            ),
            findings,
        )
    if config is not None:
        _build(f"{where}.network", lambda: AutoencoderKL(config), findings)
    _check_loss(where, model, size_px, findings)
    _check_init(f"{where}.init", model.init, config, findings)


def _fits(where: str, size_px: int, factor: int, findings: Findings) -> bool:
    if size_px % factor == 0:
        return True
    near = sorted({max(factor, size_px - size_px % factor), size_px - size_px % factor + factor})
    findings.refuse(
        "acquire.image.size_px",
        f"{size_px} px, but {where}.network has {factor.bit_length()} resolutions, which need a multiple of {factor}:"
        f" give {' or '.join(map(str, near))}, or fewer block_out_channels",
    )
    return False


def _check_loss(where: str, model: AutoencoderModel, size_px: int | None, findings: Findings) -> None:
    weights = model.loss.model_dump()
    if not any(weights.values()):
        findings.refuse(
            f"{where}.loss", f"all weights are 0, so that nothing is learned: give one of {listed(weights)}"
        )
    elif not any(value for key, value in weights.items() if key != "kl"):
        findings.note(f"{where}.loss", "only kl has a weight: reconstructions won't be like the images")
    for key, least in (("perceptual", LEAST_PX), ("pooled_l1", POOL)):
        if weights[key] and size_px is not None and size_px < least:
            findings.refuse(
                f"{where}.loss.{key}",
                f"{weights[key]:g} with images of {size_px} px: the term needs {least} px or more; raise"
                " acquire.image.size_px, or set the weight to 0",
            )


def _check_init(where: str, init: str, config: AutoencoderConfig | None, findings: Findings) -> None:
    shipped = shipped_weights()
    if init in shipped:
        misfits = [] if config is None else shape_misfits(config_of(init), config)
        if misfits:
            findings.refuse(
                where,
                f"{init!r} are weights of another shape: {', '.join(misfits)}; change `network`, or init to {SCRATCH}",
            )
    elif init != SCRATCH and not is_path(init):
        findings.refuse(
            where,
            f"{init!r} is none of {', '.join((SCRATCH, *shipped))}; a folder with an AutoencoderKL is a path with a"
            f" slash (./{init}), or a URL{meant(init, (SCRATCH, *shipped))}",
        )
    else:
        check_scheme(where, init, findings)


# -- CLIP --------------------------------------------------------------------------------------------------------------


def _check_clip(
    recipe: Recipe, name: str, model: ClipModel, size_px: int | None, columns: Columns, findings: Findings
) -> None:
    where = f"models.{name}"
    for field, message in clip_misfits(model.network, size_px).items():
        findings.refuse(f"{where}.network.{field}", message)
    if model.train.global_batch_size < 2:
        findings.refuse(
            f"{where}.train.global_batch_size", "1: a pair is told from the others of its batch; give 2 or more"
        )
    if model.split is not None:
        check_split(f"{where}.split", model.split, columns, findings)
    elif recipe.select.split.by not in columns and recipe.select.split.by in SCORED_BY:
        findings.refuse(
            f"{where}.split",
            f"none, and by default as select.split, by column {recipe.select.split.by!r}; scores are made after this"
            " model: give it a split by a column of the source",
        )


# -- text to image -----------------------------------------------------------------------------------------------------


def _check_text_to_image(
    recipe: Recipe, name: str, model: TextToImageModel, size_px: int | None, findings: Findings
) -> None:
    where = f"models.{name}"
    width = _check_text(f"{where}.text", model, findings)
    first_stage = recipe.models.get(model.first_stage)
    latents = (4, SOME_SIDE)
    if isinstance(first_stage, AutoencoderModel):
        factor = 1 << (len(first_stage.network.block_out_channels) - 1)
        side = max(1, size_px // factor) if size_px is not None else SOME_SIDE
        latents = (first_stage.network.latent_channels, side)
    _check_unet(f"{where}.network", model, latents, width, findings)
    diffusion = _made(
        f"{where}.diffusion",
        model.diffusion,
        lambda block: diffusion_config(model.model_copy(update={"diffusion": block})),
        findings,
    )
    if diffusion is not None:
        _check_sampling(f"{where}.sampling", model, diffusion, latents[1] ** 2, findings)
        if recipe.release is not None and recipe.release.model == name:
            _told(f"{where}.diffusion", lambda: scheduler_config(diffusion), findings)
    guided = model.sampling.guidance_scale != 1
    if guided and model.diffusion.caption_dropout == 0:
        findings.note(
            f"{where}.diffusion.caption_dropout",
            "0: the model never sees an empty prompt, which guidance compares with; give 0.1, or"
            " sampling.guidance_scale 1",
        )
    if model.diffusion.caption_dropout == 1:
        findings.note(f"{where}.diffusion.caption_dropout", "1: the model never sees a caption")
    if model.evaluate is not None:
        if recipe.select.split.held_out == 0:
            findings.note(f"{where}.evaluate", "select.split.held_out is 0: nothing is measured on captions not seen")
        if model.evaluate.prompts < 2:
            findings.note(f"{where}.evaluate.prompts", "1: faithfulness compares prompts; give 2 or more to have it")


def _check_text(where: str, model: TextToImageModel, findings: Findings) -> int:
    """The width of the encoder's states, or some width."""
    encoder, tokens = model.text.encoder, model.text.tokens
    if encoder in PACKAGED:
        most, width = ENCODER_SHAPES[encoder]
        if tokens > most:
            findings.refuse(f"{where}.tokens", f"{tokens}: {encoder} reads {most} at most")
        return width
    if not is_path(encoder):
        findings.refuse(
            f"{where}.encoder",
            f"{encoder!r} is none of {', '.join(PACKAGED)}; the folder of another encoder is a path with a slash"
            f" (./{encoder}){meant(encoder, PACKAGED)}",
        )
    elif "://" in encoder:
        findings.refuse(f"{where}.encoder", f"{encoder!r} is a URL; copy the folder here, and give its path")
    return SOME_WIDTH


def _check_unet(where: str, model: TextToImageModel, latents: tuple[int, int], width: int, findings: Findings) -> None:
    network = model.network
    channels = network.block_out_channels
    fits = _divides(f"{where}.norm_num_groups", network.norm_num_groups, channels, findings)
    fits &= _divides(f"{where}.attention_head_dim", network.attention_head_dim, channels, findings)
    if len(network.cross_attention) != len(channels):
        findings.refuse(
            f"{where}.cross_attention",
            f"{len(network.cross_attention)} entries, block_out_channels has {len(channels)}; give one for each",
        )
        return
    if not fits:
        return
    config = _made(
        where,
        network,
        lambda block: unet_config(
            model.model_copy(update={"network": block}),
            latent_channels=latents[0],
            sample_size=latents[1],
            context_width=width,
        ),
        findings,
    )
    if config is not None:
        _build(where, lambda: UNet2DCondition(config), findings)


def _check_sampling(
    where: str, model: TextToImageModel, config: DiffusionConfig, latent_pixels: int, findings: Findings
) -> None:
    """Goes through the sampler's steps with a network that predicts 0."""
    sampling, diffusion = model.sampling, Diffusion(config)
    _told(f"{where}.guidance_scale", lambda: Guidance(sampling.guidance_scale), findings)
    sampler = get_sampler(sampling.sampler)
    levels = _told(
        f"{where}.sampler",
        lambda: sampler.levels_of(diffusion, sampling.steps, None, latent_pixels),
        findings,
        {"steps": f"{where}.steps"},
    )
    if levels is None:
        return
    start = levels.start(torch.ones(1, 1, 1, 1))
    last = sampler.solve(
        lambda x, level: diffusion.denoised(x, 0 * x, level.alpha, level.sigma),
        start,
        levels,
        lambda: torch.ones_like(start),
    )
    if not bool(last.isfinite().all()):
        findings.refuse(
            f"{where}.sampler",
            f"{sampling.sampler!r} in {sampling.steps} steps leads to no numbers with prediction {config.prediction!r};"
            " take dpmpp_2m or euler, or another number of steps",
        )


# -- building ----------------------------------------------------------------------------------------------------------


def _divides(where: str, divisor: int, channels: Sequence[int], findings: Findings) -> bool:
    bad = [count for count in channels if count % divisor]
    if bad:
        findings.refuse(
            where,
            f"{divisor} does not divide {listed(dict.fromkeys(bad))} (block_out_channels); give a divisor of all,"
            f" such as {math.gcd(divisor, *channels)}, or other channels",
        )
    return not bad


def _made(where: str, block: AnyBlock, make: Callable[[AnyBlock], Built], findings: Findings) -> Built | None:
    """What `make` makes of the block. A field that it refuses is told, and set to its default to find the next one."""
    sound = True
    for _ in type(block).model_fields:
        try:
            made = make(block)
        except ConfigError as error:
            sound = False
            field = _field_of(str(error), block)
            findings.refuse(f"{where}.{field}" if field else where, _without(str(error), field))
            if not field or type(block).model_fields[field].is_required():
                return None
            block = block.model_copy(update={field: type(block).model_fields[field].get_default()})
        else:
            return made if sound else None
    return None


def _told(
    where: str, make: Callable[[], Built], findings: Findings, fields: dict[str, str] | None = None
) -> Built | None:
    """What `make` makes. `fields`: other places than `where`, by the word that an error about them begins with."""
    try:
        return make()
    except ConfigError as error:
        field = str(error).partition(" ")[0]
        place = (fields or {}).get(field)
        findings.refuse(place or where, _without(str(error), field) if place else str(error))
    return None


def _build(where: str, build: Callable[[], nn.Module], findings: Findings) -> None:
    try:
        with torch.device("meta"):
            build()
    except (ValueError, RuntimeError, OverflowError) as error:
        findings.refuse(where, f"there is no such network ({error}); change its numbers")


def _field_of(message: str, block: Block) -> str:
    """The field that an error's message begins with; none if it begins with another word."""
    found = re.match(r"\w+", message)
    return found.group() if found and found.group() in type(block).model_fields else ""


def _without(message: str, field: str) -> str:
    """The message without "field = ", which the path says, and with true and false as YAML has them."""
    message = message.removeprefix(f"{field} = ")
    first, space, rest = message.partition(" ")
    return (json.dumps(first == "True") if first in {"True", "False"} else first) + space + rest
