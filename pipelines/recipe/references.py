"""Names in a recipe that stand for other parts of it: what its graph can't be drawn without."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.recipe import NAME_PATTERN, Recipe
from pipelines.recipe.kinds import KINDS
from pipelines.recipe.named import clip_problems, model_problems
from pipelines.recipe.problems import Problem

MAX_NAME_CHARS = 100


def reference_problems(recipe: Recipe) -> Iterator[Problem]:
    """One for each name that is no name, or stands for nothing, or for something that can't take that place."""
    for name, model in recipe.models.items():
        if not NAME_PATTERN.fullmatch(name) or len(name) > MAX_NAME_CHARS:
            yield Problem(
                f"models.{name}",
                "a model's name is lower-case letters, digits and _, beginning with a letter, at most"
                f" {MAX_NAME_CHARS} in all; got {name!r}",
            )
        yield from KINDS[model.kind].references(recipe, name, model)
    if recipe.score is not None and recipe.score.clip is not None:
        yield from clip_problems(recipe, "score.clip", recipe.score.clip)
    if recipe.select.near_duplicates is not None and (recipe.score is None or not recipe.score.phash):
        yield Problem(
            "select.near_duplicates", "needs the columns of score.phash; set score.phash to true, or leave this out"
        )
    if recipe.release is not None:
        released = [kind for kind, row in KINDS.items() if row.is_released]
        yield from model_problems(recipe, "release.model", recipe.release.model, released)
