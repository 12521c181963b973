"""The kinds of model, by the name that a recipe's key `kind` gives: what node `encode.<model>` computes for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic

from infra.storage import Store
from pipelines.artifacts import Artifact, Identity
from pipelines.encode import stage
from pipelines.recipe import Execution, TextToImageModel
from pipelines.recipe.models import AnyModel
from pipelines.reporting import Report


@dataclass(frozen=True)
class EncodeKind(Generic[AnyModel]):
    """A kind of model that is trained on a cache: how that is made."""

    format_version: int
    """Version of what is published."""
    identity: Callable[[AnyModel], Identity]
    """All of the recipe that affects the cache."""
    encode: Callable[[str, AnyModel, Mapping[str, Artifact], Store, Report, Execution], Artifact]
    """The cache for a model of that name, made of the node's inputs."""


TEXT_TO_IMAGE: EncodeKind[TextToImageModel] = EncodeKind(stage.FORMAT_VERSION, stage.identity, stage.encode)

KINDS: dict[str, EncodeKind[Any] | None] = {
    "autoencoder": None,
    "clip": None,
    "text_to_image": TEXT_TO_IMAGE,
}
"""Kinds of model by name. None: such a model is trained on the images themselves."""
