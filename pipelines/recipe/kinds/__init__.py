"""The kinds of model that a recipe may ask for, by the name that its key `kind` gives.

What else is known of a kind stands in further tables, by the same name: `recipe.model_checks`, whose networks take a
moment to import, and of each room `workflow.kinds` (nodes, and what they need of this machine), `train.kinds`,
`encode.kinds`, `evaluate.kinds` and `release.kinds`.
"""

from __future__ import annotations

from typing import Any

from pipelines.recipe.kinds.autoencoder import AUTOENCODER
from pipelines.recipe.kinds.clip import CLIP
from pipelines.recipe.kinds.kind import ModelKind
from pipelines.recipe.kinds.text_to_image import TEXT_TO_IMAGE

KINDS: dict[str, ModelKind[Any]] = {
    "autoencoder": AUTOENCODER,
    "clip": CLIP,
    "text_to_image": TEXT_TO_IMAGE,
}
