"""The kinds of model, by the name that a recipe's key `kind` gives: what node `evaluate.<model>` makes and measures of
each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

from infra.storage import Store
from pipelines.artifacts import Artifact, Identity
from pipelines.evaluate import stage
from pipelines.recipe import Execution, TextToImageModel
from pipelines.recipe.models import AnyModel
from pipelines.reporting import Report


@dataclass(frozen=True)
class EvaluateKind(Generic[AnyModel]):
    """A kind of model that is evaluated in a node of its own: how."""

    format_version: int
    """Version of what is published."""
    identity: Callable[[AnyModel], Identity]
    """All of the recipe that affects pictures and figures, apart from what the weights were made with."""
    evaluate: Callable[[str, AnyModel, Mapping[str, Artifact], Store, Report, Execution], Artifact]
    """Pictures and figures of a model of that name, made of the node's inputs."""


TEXT_TO_IMAGE: EvaluateKind[TextToImageModel] = EvaluateKind(stage.FORMAT_VERSION, stage.identity, stage.evaluate)

KINDS: dict[str, EvaluateKind[Any] | None] = {
    "autoencoder": None,
    "clip": None,
    "text_to_image": TEXT_TO_IMAGE,
}
"""Kinds of model by name. None: such a model has the figures of its training alone."""
