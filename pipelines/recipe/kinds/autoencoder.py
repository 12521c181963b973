"""The kind "autoencoder", a first stage: what the recipe knows of it."""

from __future__ import annotations

from pipelines.recipe import AutoencoderModel
from pipelines.recipe.kinds.kind import ModelKind, none, nothing, refers_to_nothing

AUTOENCODER: ModelKind[AutoencoderModel] = ModelKind(
    block=AutoencoderModel,
    references=refers_to_nothing,
    uses=none,
    sampling=nothing,
    evaluation=nothing,
    is_part=True,
    is_released=False,
    compares_batch=False,
)
