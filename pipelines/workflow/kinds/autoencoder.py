"""The kind "autoencoder": its node, trained on the selected images, and what that needs of this machine."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.recipe import AutoencoderModel, Recipe
from pipelines.recipe.errors import RecipeError
from pipelines.recipe.weights import SCRATCH, config_of, shape_misfits
from pipelines.workflow.kinds.kind import WorkflowKind, selected_pairs, train_node
from pipelines.workflow.needs import Here
from pipelines.workflow.node import Node

VGG16 = 'pip install "latentworks[perceptual]"'


def _nodes(recipe: Recipe, name: str, model: AutoencoderModel) -> Sequence[Node]:
    return (train_node(name, model, (*recipe.acquired, "select")),)


def _check(here: Here, name: str, model: AutoencoderModel) -> None:
    if not here.any_of(f"train.{name}"):
        return
    if model.loss.perceptual:
        here.need(f"models.{name}.loss.perceptual", ("stlpips_pytorch",), VGG16, "set the weight to 0")
    if model.init == SCRATCH:
        return
    from ldm.autoencoder import AutoencoderConfig

    path = f"models.{name}.init"
    try:
        misfits = shape_misfits(config_of(model.init), AutoencoderConfig(**model.network.model_dump()))
    except RecipeError as error:
        here.absent(path, str(error).removeprefix(f"init = {model.init!r}: "))
    else:
        if misfits:
            here.absent(path, f"{model.init!r} are weights of another shape: {', '.join(misfits)}; change `network`")


AUTOENCODER: WorkflowKind[AutoencoderModel] = WorkflowKind(_nodes, released=None, check=_check, pairs=selected_pairs)
