"""Names in a recipe that stand for other parts of it: what its graph can't be drawn without."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.recipe import NAME_PATTERN, Recipe
from pipelines.recipe.kinds import KINDS
from pipelines.recipe.named import clip_problems, model_problems
from pipelines.recipe.problems import Problem

MAX_NAME_CHARS = 100


def reference_problems(recipe: Recipe) -> Iterator[Problem]:
    """A problem for each name that is no name, or stands for nothing, or for something that can't take that place."""
    if recipe.source is not None and recipe.sources:
        yield Problem("sources", f"source is given too; name it among the others, as sources.{_free_name(recipe)}")
    elif recipe.source is None and not recipe.sources:
        yield Problem("source", "missing; add this key, or several by name under sources")
    for name in recipe.sources:
        yield from _name_problems("sources", "a source's", name)
    for name, model in recipe.models.items():
        yield from _name_problems("models", "a model's", name)
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


def _name_problems(key: str, whose: str, name: str) -> Iterator[Problem]:
    if not NAME_PATTERN.fullmatch(name) or len(name) > MAX_NAME_CHARS:
        yield Problem(
            f"{key}.{name}",
            f"{whose} name is lower-case letters, digits and _, beginning with a letter, at most {MAX_NAME_CHARS} in"
            f" all; got {name!r}",
        )


def _free_name(recipe: Recipe) -> str:
    """A name that no source has yet."""
    return next(name for name in ("first", "other", *(f"other{n}" for n in range(9999))) if name not in recipe.sources)
