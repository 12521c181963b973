"""What of the models does not go together, as the recipe alone shows it: everything is built that training will build,
on the meta device, where it takes no memory, and whatever can't be built is told.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.conditioning.text import PACKAGED
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.guidance import Guidance
from ldm.interchange.schedulers import scheduler_config
from ldm.losses import POOL
from ldm.perceptual import LEAST_PX
from ldm.samplers import get_sampler
from ldm.unet import UNet2DCondition
from pipelines.recipe import AutoencoderModel, ClipModel, Recipe, TextToImageModel
from pipelines.recipe.columns import Columns, ledger_columns
from pipelines.recipe.data_checks import check_split, stored_side_px
from pipelines.recipe.networks import autoencoder_config, clip_misfits, diffusion_config, unet_config
from pipelines.recipe.places import check_scheme
from pipelines.recipe.predicates import SCORED_BY
from pipelines.recipe.problems import Findings, listed, meant
from pipelines.recipe.references import is_path
from pipelines.recipe.trials import build, check_groups, divides, made, told
from pipelines.recipe.weights import SCRATCH, config_of, shape_misfits, shipped_weights

ENCODER_SHAPES = {"minilm": (512, 384)}
"""Of the text encoders that come in packages: the most tokens, and the width of their states."""
SOME_WIDTH = 768
"""Of the states of an encoder that is not known here."""
SOME_SIDE = 8
"""Of latents whose size is not known here."""
ENOUGH_LAYERS = 2
"""Of a kind: those that follow are like the second, and would only take time to build."""


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
    if divides(f"{where}.network.norm_num_groups", network.norm_num_groups, network.block_out_channels, findings):
        config = made(
            f"{where}.network",
            network,
            lambda block: autoencoder_config(
                model.model_copy(update={"network": block}), size_px if fits and size_px is not None else factor
            ),
            findings,
        )
    if config is not None:
        shallow = replace(config, layers_per_block=min(config.layers_per_block, ENOUGH_LAYERS))
        build(f"{where}.network", lambda: AutoencoderKL(shallow), findings)
        if fits and size_px is not None:
            groups = network.norm_num_groups
            check_groups(f"{where}.network.norm_num_groups", groups, network.block_out_channels, size_px, findings)
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
    for key, least in (("perceptual", LEAST_PX), ("pooled_l1", POOL), ("gradient_l1", 2)):
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
    if model.split is not None and model.split.by in SCORED_BY and model.split.by not in columns:
        findings.refuse(
            f"{where}.split.by",
            f"{model.split.by!r} is a column of scores, which are made after this model; give a column of the source",
        )
    elif model.split is not None:
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
    if isinstance(first_stage, AutoencoderModel) and size_px is not None:
        network = model.network
        groups, channels = network.norm_num_groups, network.block_out_channels
        check_groups(f"{where}.network.norm_num_groups", groups, channels, latents[1], findings)
    diffusion = made(
        f"{where}.diffusion",
        model.diffusion,
        lambda block: diffusion_config(model.model_copy(update={"diffusion": block})),
        findings,
    )
    if diffusion is not None:
        _check_sampling(f"{where}.sampling", model, diffusion, latents[1] ** 2, findings)
        if recipe.release is not None and recipe.release.model == name:
            told(f"{where}.diffusion", lambda: scheduler_config(diffusion), findings)
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
    fits = divides(f"{where}.norm_num_groups", network.norm_num_groups, channels, findings)
    fits &= divides(f"{where}.attention_head_dim", network.attention_head_dim, channels, findings)
    if len(network.cross_attention) != len(channels):
        findings.refuse(
            f"{where}.cross_attention",
            f"{len(network.cross_attention)} entries, block_out_channels has {len(channels)}; give one for each",
        )
        return
    if not fits:
        return
    config = made(
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
        depths = ("layers_per_block", "transformer_layers_per_block")
        shallow = replace(config, **{name: min(getattr(network, name), ENOUGH_LAYERS) for name in depths})
        build(where, lambda: UNet2DCondition(shallow), findings)


def _check_sampling(
    where: str, model: TextToImageModel, config: DiffusionConfig, latent_pixels: int, findings: Findings
) -> None:
    """Goes through the sampler's steps with a network that predicts 0."""
    sampling, diffusion = model.sampling, Diffusion(config)
    told(f"{where}.guidance_scale", lambda: Guidance(sampling.guidance_scale), findings)
    sampler = get_sampler(sampling.sampler)
    levels = told(
        f"{where}.sampler",
        lambda: sampler.levels_of(diffusion, sampling.steps, None, latent_pixels),
        findings,
        {"steps": f"{where}.steps"},
    )
    if levels is None:
        return
    start = levels.start(torch.ones(1, 1, 1, 1))
    try:
        last = sampler.solve(
            lambda x, level: diffusion.denoised(x, 0 * x, level.alpha, level.sigma),
            start,
            levels,
            lambda: torch.ones_like(start),
        )
        is_number = bool(last.isfinite().all())
    except ArithmeticError:
        is_number = False
    if is_number:
        return
    how = f"{sampling.sampler!r} in {sampling.steps} steps leads to no numbers with prediction {config.prediction!r}"
    if not 1e-3 <= config.flow_shift <= 1e3:
        findings.refuse(
            f"{where.removesuffix('.sampling')}.diffusion.flow_shift",
            f"{config.flow_shift:g}: {how} and this shift; give one from 1 to 10, as is usual",
        )
    else:
        findings.refuse(
            f"{where}.sampler", f"{how}; take another sampler, such as dpmpp_2m or euler, or another number of steps"
        )
