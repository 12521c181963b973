"""Names in a recipe that stand for other parts of it: what its graph can't be drawn without."""

from __future__ import annotations

from collections.abc import Iterator
from posixpath import normpath

from pipelines.recipe import NAME_PATTERN, AutoencoderModel, Block, ClipModel, Recipe, TextToImageModel
from pipelines.recipe.problems import Problem, meant

HUB = "hub:"
KINDS: dict[type[Block], str] = {
    AutoencoderModel: "autoencoder",
    ClipModel: "clip",
    TextToImageModel: "text_to_image",
}
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
        if isinstance(model, TextToImageModel):
            yield from _model(recipe, f"models.{name}.first_stage", model.first_stage, AutoencoderModel)
            if model.evaluate is not None and model.evaluate.judge is not None:
                yield from _judge(recipe, f"models.{name}.evaluate.judge", model.evaluate.judge)
    if recipe.score is not None and recipe.score.clip is not None:
        yield from _clip(recipe, "score.clip", recipe.score.clip)
    if recipe.select.near_duplicates is not None and (recipe.score is None or not recipe.score.phash):
        yield Problem(
            "select.near_duplicates", "needs the columns of score.phash; set score.phash to true, or leave this out"
        )
    if recipe.release is not None:
        yield from _model(recipe, "release.model", recipe.release.model, TextToImageModel)


def is_path(text: str) -> bool:
    """Whether a value that may be a name is meant as a path or URL: it has a slash, or begins with a dot."""
    return "/" in text or text.startswith(".")


def _judge(recipe: Recipe, where: str, judge: str) -> Iterator[Problem]:
    yield from _clip(recipe, where, judge)
    scorer = None if recipe.score is None else recipe.score.clip
    if scorer is None:
        return
    if scorer == judge or (is_path(judge) and is_path(scorer) and normpath(judge) == normpath(scorer)):
        yield Problem(
            where, f"{judge!r} is also score.clip; what was selected by a CLIP can't be judged by it: name another one"
        )
    elif scorer in recipe.models and judge in recipe.models and _is_same_clip(recipe, scorer, judge):
        yield Problem(
            where,
            f"models.{judge} is trained just as models.{scorer}, which is score.clip, and comes out the same; what was"
            f" selected by a CLIP can't be judged by it: give models.{judge} another train.seed and a split of its own",
        )


def _is_same_clip(recipe: Recipe, one: str, other: str) -> bool:
    found = [recipe.model(name) for name in (one, other)]
    return all(isinstance(model, ClipModel) for model in found) and found[0].content() == found[1].content()


def _clip(recipe: Recipe, where: str, name: str) -> Iterator[Problem]:
    """A clip model of the recipe, one on a hub, or a folder."""
    if name.startswith(HUB):
        architecture, slash, tag = name.removeprefix(HUB).partition("/")
        if not (architecture and slash and tag):
            yield Problem(where, f'{name!r} must be "hub:NAME/TAG", such as "hub:ViT-B-32/laion2b_s34b_b79k"')
    elif not is_path(name) or name in recipe.models:
        more = f', or give "{HUB}NAME/TAG" or a folder as a path with a slash ("./{name}")'
        yield from _model(recipe, where, name, ClipModel, more)
    elif "://" in name:
        yield Problem(where, f"{name!r} is a URL; open_clip loads local folders: copy it, and give the folder's path")


def _model(recipe: Recipe, where: str, name: str, kind: type[Block], more: str = "") -> Iterator[Problem]:
    if not isinstance(recipe.models.get(name), kind):
        fitting = [other for other, model in recipe.models.items() if isinstance(model, kind)]
        said = f"{name!r} is no {KINDS[kind]} model of this recipe; it has {', '.join(fitting) or 'none'}"
        yield Problem(where, said + more + meant(name, fitting))
