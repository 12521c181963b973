"""The kind "text_to_image", a latent diffusion model that makes pictures of prompts: what the recipe knows of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from posixpath import normpath

from pipelines.recipe import EvaluateSpec, Recipe, Sampling, TextToImageModel
from pipelines.recipe.kinds.kind import ModelKind
from pipelines.recipe.named import CLIP, clip_problems, is_path, model_problems
from pipelines.recipe.problems import Problem

FIRST_STAGE = "autoencoder"


def _references(recipe: Recipe, name: str, model: TextToImageModel) -> Iterator[Problem]:
    yield from model_problems(recipe, f"models.{name}.first_stage", model.first_stage, (FIRST_STAGE,))
    if model.evaluate is not None and model.evaluate.judge is not None:
        yield from _judge(recipe, f"models.{name}.evaluate.judge", model.evaluate.judge)


def _judge(recipe: Recipe, where: str, judge: str) -> Iterator[Problem]:
    yield from clip_problems(recipe, where, judge)
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
    return all(model.kind == CLIP for model in found) and found[0].content() == found[1].content()


def _uses(model: TextToImageModel) -> Collection[str]:
    judge = None if model.evaluate is None else model.evaluate.judge
    return {model.first_stage} if judge is None else {model.first_stage, judge}


def _sampling(model: TextToImageModel) -> Sampling:
    return model.sampling


def _evaluation(model: TextToImageModel) -> EvaluateSpec | None:
    return model.evaluate


TEXT_TO_IMAGE: ModelKind[TextToImageModel] = ModelKind(
    block=TextToImageModel,
    references=_references,
    uses=_uses,
    sampling=_sampling,
    evaluation=_evaluation,
    is_part=False,
    is_released=True,
    compares_batch=False,
)
