"""Names of models in a recipe: whether they stand for one that can take that place."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pipelines.recipe import Recipe
from pipelines.recipe.problems import Problem, meant

HUB = "hub:"
CLIP = "clip"


def is_path(text: str) -> bool:
    """Whether a value that may be a name is meant as a path or URL: it has a slash, or begins with a dot."""
    return "/" in text or text.startswith(".")


def model_problems(recipe: Recipe, where: str, name: str, kinds: Collection[str], more: str = "") -> Iterator[Problem]:
    """The problem of a name that is to stand for a model of one of the kinds, if it doesn't. `more` is what else could
    be given."""
    fitting = [other for other, model in recipe.models.items() if model.kind in kinds]
    if name not in fitting:
        said = f"{name!r} is no {' or '.join(kinds)} model of this recipe; it has {', '.join(fitting) or 'none'}"
        yield Problem(where, said + more + meant(name, fitting))


def clip_problems(recipe: Recipe, where: str, name: str) -> Iterator[Problem]:
    """The problem of a name that is to stand for a clip model of the recipe, one on a hub, or a folder, if any."""
    if name.startswith(HUB):
        architecture, slash, tag = name.removeprefix(HUB).partition("/")
        if not (architecture and slash and tag):
            yield Problem(where, f'{name!r} must be "hub:NAME/TAG", such as "hub:ViT-B-32/laion2b_s34b_b79k"')
    elif not is_path(name) or name in recipe.models:
        more = f', or give "{HUB}NAME/TAG" or a folder as a path with a slash ("./{name}")'
        yield from model_problems(recipe, where, name, (CLIP,), more)
    elif "://" in name:
        yield Problem(where, f"{name!r} is a URL; open_clip loads local folders: copy it, and give the folder's path")
