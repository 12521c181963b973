"""The kind "autoencoder", a first stage: what the recipe knows of it."""

from __future__ import annotations

from pipelines.recipe import AutoencoderModel, Recipe
from pipelines.recipe.kinds.kind import ModelKind, none, nothing, refers_to_nothing
from pipelines.recipe.problems import Findings


def _check(recipe: Recipe, name: str, model: AutoencoderModel, findings: Findings) -> None:
    from pipelines.recipe.model_checks.autoencoder import check

    check(recipe, name, model, findings)


AUTOENCODER: ModelKind[AutoencoderModel] = ModelKind(
    block=AutoencoderModel,
    check=_check,
    references=refers_to_nothing,
    uses=none,
    sampling=nothing,
    evaluation=nothing,
    is_part=True,
    is_released=False,
    compares_batch=False,
)
