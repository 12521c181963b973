"""What of an autoencoder does not go together: network and images' size, weights of its loss, weights to begin with."""

from __future__ import annotations

from dataclasses import replace

from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.losses import POOL
from ldm.perceptual import LEAST_PX
from pipelines.recipe import AutoencoderModel, Recipe
from pipelines.recipe.data_checks import side_px
from pipelines.recipe.named import is_path
from pipelines.recipe.networks import autoencoder_config
from pipelines.recipe.places import check_scheme
from pipelines.recipe.problems import Findings, listed, meant
from pipelines.recipe.trials import ENOUGH_LAYERS, build, check_groups, divides, made
from pipelines.recipe.weights import SCRATCH, config_of, shape_misfits, shipped_weights


def check(recipe: Recipe, name: str, model: AutoencoderModel, findings: Findings) -> None:
    where, network, size_px = f"models.{name}", model.network, side_px(recipe)
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
