"""What of each kind of model does not go together, as the recipe alone shows it: everything is built that training will
build, on the meta device, where it takes no memory, and whatever can't be built is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipelines.recipe import Recipe
from pipelines.recipe.model_checks import autoencoder, clip, text_to_image
from pipelines.recipe.problems import Findings

Check = Callable[[Recipe, str, Any, Findings], None]
"""Tells what of a recipe's model, given with its name among `models`, can't be, and what is worth a look."""

CHECKS: dict[str, Check] = {
    "autoencoder": autoencoder.check,
    "clip": clip.check,
    "text_to_image": text_to_image.check,
}
