"""The kinds of model, by the name that a recipe's key `kind` gives: the folder that node `release` makes of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

from infra.storage import Store
from pipelines.artifacts import Artifact, Identity
from pipelines.recipe import Execution, ReleaseSpec, TextToImageModel
from pipelines.recipe.models import AnyModel
from pipelines.release import stage
from pipelines.reporting import Report


@dataclass(frozen=True)
class ReleaseKind(Generic[AnyModel]):
    """A kind of model that is released: how."""

    format_version: int
    """Version of what is published."""
    needs_cluster: bool
    """Whether it works on Ray."""
    identity: Callable[[ReleaseSpec, AnyModel], Identity]
    """All of the recipe that affects the folder, apart from what the weights were made with."""
    release: Callable[[ReleaseSpec, AnyModel, Mapping[str, Artifact], Store, Report, Execution], Artifact]
    """The model's folder, made of the node's inputs."""


TEXT_TO_IMAGE: ReleaseKind[TextToImageModel] = ReleaseKind(
    stage.FORMAT_VERSION, stage.NEEDS_CLUSTER, stage.identity, stage.release
)

KINDS: dict[str, ReleaseKind[Any] | None] = {
    "autoencoder": None,
    "clip": None,
    "text_to_image": TEXT_TO_IMAGE,
}
"""Kinds of model by name. None: such a model is not released on its own."""
