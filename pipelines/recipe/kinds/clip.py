"""The kind "clip", which scores pairs and judges pictures: what the recipe knows of it."""

from __future__ import annotations

from pipelines.recipe import ClipModel, Recipe
from pipelines.recipe.kinds.kind import ModelKind, none, nothing, refers_to_nothing
from pipelines.recipe.problems import Findings


def _check(recipe: Recipe, name: str, model: ClipModel, findings: Findings) -> None:
    from pipelines.recipe.model_checks.clip import check

    check(recipe, name, model, findings)


CLIP: ModelKind[ClipModel] = ModelKind(
    block=ClipModel,
    check=_check,
    references=refers_to_nothing,
    uses=none,
    sampling=nothing,
    evaluation=nothing,
    is_part=True,
    is_released=False,
    compares_batch=True,
)
