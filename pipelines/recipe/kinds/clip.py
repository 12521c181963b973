"""The kind "clip", which scores pairs and judges pictures: what the recipe knows of it."""

from __future__ import annotations

from pipelines.recipe import ClipModel
from pipelines.recipe.kinds.kind import ModelKind, none, nothing, refers_to_nothing

CLIP: ModelKind[ClipModel] = ModelKind(
    block=ClipModel,
    references=refers_to_nothing,
    uses=none,
    sampling=nothing,
    evaluation=nothing,
    is_part=True,
    is_released=False,
    compares_batch=True,
)
