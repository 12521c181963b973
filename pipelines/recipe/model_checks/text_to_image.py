"""What of a text-to-image model does not go together: text encoder, U-Net, process, and how pictures are made."""

from __future__ import annotations

from dataclasses import replace

import torch

from ldm.conditioning.text import PACKAGED
from ldm.diffusion import Diffusion, DiffusionConfig
from ldm.guidance import Guidance
from ldm.interchange.schedulers import scheduler_config
from ldm.samplers import SAMPLERS, get_sampler
from ldm.unet import UNet2DCondition
from pipelines.recipe import AutoencoderModel, Recipe, TextToImageModel
from pipelines.recipe.data_checks import side_px
from pipelines.recipe.named import is_path
from pipelines.recipe.networks import diffusion_config, unet_config
from pipelines.recipe.plugins import error_of, plugin_of
from pipelines.recipe.problems import Findings, meant
from pipelines.recipe.trials import ENOUGH_LAYERS, build, check_groups, divides, made, told

ENCODER_SHAPES = {"minilm": (512, 384)}
"""Most tokens that a packaged text encoder reads, and the width of its states, by name."""
SOME_WIDTH = 768
"""Width of an encoder's states where the encoder is not known here."""
SOME_SIDE = 8
"""Side of latents whose size is not known here."""


def check(recipe: Recipe, name: str, model: TextToImageModel, findings: Findings) -> None:
    where, size_px = f"models.{name}", side_px(recipe)
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
    """Goes through the sampler's steps with a network that predicts 0. One that nobody knows is told of elsewhere."""
    told(f"{where}.guidance_scale", lambda: Guidance(model.sampling.guidance_scale), findings)
    plugin = plugin_of("sampler", model.sampling.sampler)
    try:
        if model.sampling.sampler in SAMPLERS:
            _check_steps(where, model, config, latent_pixels, findings)
    except Exception as error:
        if plugin is None:
            raise
        findings.refuse(f"{where}.sampler", error_of(plugin, error))


def _check_steps(
    where: str, model: TextToImageModel, config: DiffusionConfig, latent_pixels: int, findings: Findings
) -> None:
    sampling, diffusion = model.sampling, Diffusion(config)
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
