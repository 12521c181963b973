"""What the recipe knows of a kind of model. A kind is a row of `pipelines.recipe.kinds.KINDS`, of this shape."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Generic

from pipelines.recipe import EvaluateSpec, Recipe, Sampling
from pipelines.recipe.models import AnyModel
from pipelines.recipe.problems import Problem


@dataclass(frozen=True)
class ModelKind(Generic[AnyModel]):
    """A kind of model as the recipe sees it: its block, and what its graph and other blocks need to know of it."""

    block: type[AnyModel]
    """The block of the recipe, one of the union `Model`."""
    references: Callable[[Recipe, str, AnyModel], Iterator[Problem]]
    """One problem for each name in the block that stands for nothing, or for something that can't take that place."""
    uses: Callable[[AnyModel], Collection[str]]
    """The names in the block that may be of other models."""
    sampling: Callable[[AnyModel], Sampling | None]
    """How pictures are made with the model. None: it makes none."""
    evaluation: Callable[[AnyModel], EvaluateSpec | None]
    """What is measured on its pictures. None: nothing."""
    is_part: bool
    """Whether it is made for other models: one that none of them uses is worth a note."""
    is_released: bool
    """Whether `release.model` may name it."""
    compares_batch: bool
    """Whether its loss compares all samples of a rank's share with each other, which can't be cut in micro-batches."""


def refers_to_nothing(_recipe: Recipe, _name: str, _model: object) -> Iterator[Problem]:
    """The `references` of a kind whose block names no other part of the recipe."""
    yield from ()


def nothing(_model: object) -> None:
    """The `sampling` of a kind that makes no pictures, and the `evaluation` of one that is not measured on them."""


def none(_model: object) -> Collection[str]:
    """The `uses` of a kind whose block names no other model."""
    return ()
