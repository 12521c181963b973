"""The kind "clip": its node, trained on the acquired pairs, and what that needs of this machine."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.recipe import ClipModel, Recipe
from pipelines.workflow.kinds.kind import WorkflowKind, pairs_of_split, train_node
from pipelines.workflow.needs import DEMO, EFFICIENTNET, EXTRACTORS, Here
from pipelines.workflow.node import Node


def _nodes(recipe: Recipe, name: str, model: ClipModel) -> Sequence[Node]:
    """Before `select`, which may use its scores; which pairs it learns from is known without it."""
    return (train_node(name, model, recipe.acquired),)


def _check(here: Here, name: str, model: ClipModel) -> None:
    if here.any_of(f"train.{name}"):
        here.need(f"models.{name}", ("open_clip",), "pip install open_clip_torch", "leave the model out")
        if model.network.image_tower in EXTRACTORS:
            here.need(f"models.{name}.network.image_tower", (EFFICIENTNET, "timm"), DEMO, "choose vit")


def _pairs(here: Here, model: ClipModel, pairs: int) -> tuple[int, int]:
    return pairs_of_split(here, model.split, pairs)


CLIP: WorkflowKind[ClipModel] = WorkflowKind(_nodes, released=None, check=_check, pairs=_pairs)
