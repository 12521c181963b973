"""What the workflow knows of a kind of model. A kind is a row of `pipelines.workflow.kinds.KINDS`, of this shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic

from pipelines.recipe import Model, Recipe, ReleaseSpec, Split
from pipelines.recipe.models import AnyModel
from pipelines.workflow.needs import Here
from pipelines.workflow.node import Node


@dataclass(frozen=True)
class WorkflowKind(Generic[AnyModel]):
    """A kind of model as the workflow sees it: its nodes, and what they need. In calls, a model goes with its name
    among `models`."""

    nodes: Callable[[Recipe, str, AnyModel], Sequence[Node]]
    """The nodes that make and measure it, with what each reads."""
    released: Callable[[str, AnyModel], tuple[str, ...]] | None
    """What node `release` reads of it. None: it is not released on its own."""
    check: Callable[[Here, str, AnyModel], None]
    """Tells what those of its nodes that are to do need, and what of that is not here."""
    pairs: Callable[[Here, AnyModel, int], tuple[int, int]]
    """How many of so many acquired pairs it is trained on: at most, and as far as can be told."""


def train_node(name: str, model: Model, inputs: tuple[str, ...]) -> Node:
    """Node `train.<name>`."""
    from pipelines.train import stage as train

    identify, run = partial(train.identity, model), partial(train.train, name, model)
    return Node(f"train.{name}", inputs, train.FORMAT_VERSION, identify, run)


def encode_node(name: str, model: Model, inputs: tuple[str, ...]) -> Node:
    """Node `encode.<name>` of a kind that has one."""
    from pipelines.encode.kinds import KINDS

    kind = KINDS[model.kind]
    assert kind is not None, f"encode.kinds has no {model.kind}"
    identify, run = partial(kind.identity, model), partial(kind.encode, name, model)
    return Node(f"encode.{name}", inputs, kind.format_version, identify, run)


def evaluate_node(name: str, model: Model, inputs: tuple[str, ...]) -> Node:
    """Node `evaluate.<name>` of a kind that has one."""
    from pipelines.evaluate.kinds import KINDS

    kind = KINDS[model.kind]
    assert kind is not None, f"evaluate.kinds has no {model.kind}"
    identify, run = partial(kind.identity, model), partial(kind.evaluate, name, model)
    return Node(f"evaluate.{name}", inputs, kind.format_version, identify, run)


def release_node(spec: ReleaseSpec, model: Model, inputs: tuple[str, ...]) -> Node:
    """Node `release` of a kind that is released."""
    from pipelines.release.kinds import KINDS

    kind = KINDS[model.kind]
    assert kind is not None, f"release.kinds has no {model.kind}"
    identify, run = partial(kind.identity, spec, model), partial(kind.release, spec, model)
    return Node("release", inputs, kind.format_version, identify, run, kind.needs_cluster)


def selected_pairs(here: Here, model: object, pairs: int) -> tuple[int, int]:  # noqa: ARG001 - as `WorkflowKind.pairs`
    """The `pairs` of a kind that learns from what `select` leaves to train on."""
    if "select" in here.made:
        known = int(here.made["select"].info["train"])
        return known, known
    return pairs, _not_held_out(here.recipe.select.split, pairs)


def pairs_of_split(here: Here, split: Split | None, pairs: int) -> tuple[int, int]:
    """The `pairs` of a kind that learns from a split of the acquired pairs; by default that of `select`."""
    return pairs, _not_held_out(split or here.recipe.select.split, pairs)


def _not_held_out(split: Split, pairs: int) -> int:
    return round(pairs * (1 - split.held_out))
