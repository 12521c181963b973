"""The graph of a recipe: which stages it names, what each one reads, and what each one's key is made of.

It follows from the recipe alone: no source, no weights, no package is looked at before a key is asked for. The order of
stages is known here and in `pipelines.cli`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from graphlib import TopologicalSorter

from infra.storage import Store
from pipelines.artifacts import Artifact, Identity, artifact_key
from pipelines.errors import UnknownNode
from pipelines.recipe import ClipModel, Execution, Model, Recipe, TextToImageModel
from pipelines.reporting import Report

Run = Callable[[Mapping[str, Artifact], Store, Report, Execution], Artifact]


@dataclass(frozen=True)
class Node:
    """A stage at work in a recipe."""

    name: str
    inputs: tuple[str, ...]
    format_version: int
    identify: Callable[[], Identity]
    """Says what is asked for. May read what the recipe names: lists, folders, weights."""
    run: Run
    needs_cluster: bool = True
    """Whether it works on Ray; the others run in this process."""

    @property
    def stage(self) -> str:
        """ "train" for "train.base"."""
        return self.name.partition(".")[0]

    @cached_property
    def identity(self) -> Identity:
        """All of the recipe that affects the result.

        Raises the errors of what is read: `pipelines.errors.WrongUsage` for a missing file, a wrong column, an empty
        list.
        """
        return self.identify()

    def key(self, inputs: Mapping[str, Artifact]) -> str:
        """Of what is asked for, made from `inputs`. Raises as `identity` does."""
        used = {name: inputs[name] for name in self.inputs}
        return artifact_key(self.name, self.format_version, self.identity.content, used)


def build_graph(recipe: Recipe) -> dict[str, Node]:
    """The recipe's nodes by name, each after its inputs."""
    nodes = {node.name: node for node in (*_data_nodes(recipe), *_model_nodes(recipe), *_release_node(recipe))}
    order = TopologicalSorter({name: node.inputs for name, node in nodes.items()}).static_order()
    return {name: nodes[name] for name in order}


def selected(nodes: Mapping[str, Node], until: str | None) -> dict[str, Node]:
    """The nodes that `until` needs, and itself; all of them for None.

    `until` is a node ("train.base") or a stage ("train": all of its nodes). Raises `UnknownNode`.
    """
    if until is None:
        return dict(nodes)
    needed: set[str] = set()
    pending = wanted_nodes(nodes, until)
    while pending:
        name = pending.pop()
        needed.add(name)
        pending.extend(nodes[name].inputs)
    return {name: node for name, node in nodes.items() if name in needed}


def wanted_nodes(nodes: Mapping[str, Node], wanted: str) -> list[str]:
    """Names of the nodes that a node's or a stage's name means. Raises `UnknownNode`."""
    found = [name for name, node in nodes.items() if wanted in {name, node.stage}]
    if not found:
        raise UnknownNode(f"no node {wanted!r} in this recipe; it has {', '.join(nodes)}")
    return found


def _data_nodes(recipe: Recipe) -> Sequence[Node]:
    from pipelines.acquire import stage as acquire
    from pipelines.select import stage as curate

    scored = ("score",) if recipe.score is not None else ()
    nodes = [
        Node(
            "acquire",
            (),
            acquire.FORMAT_VERSION,
            partial(acquire.identity, recipe.acquire, recipe.source),
            partial(acquire.acquire, recipe.acquire, recipe.source),
        ),
        *_score_node(recipe),
        Node(
            "select",
            ("acquire", *scored),
            curate.FORMAT_VERSION,
            partial(curate.identity, recipe.select),
            partial(curate.select, recipe.select),
            curate.NEEDS_CLUSTER,
        ),
    ]
    if recipe.report:
        from pipelines.report import stage as dataset_report

        nodes.append(
            Node(
                "report",
                ("acquire", *scored, "select"),
                dataset_report.FORMAT_VERSION,
                dataset_report.identity,
                dataset_report.report,
                dataset_report.NEEDS_CLUSTER,
            )
        )
    return nodes


def _score_node(recipe: Recipe) -> Sequence[Node]:
    if recipe.score is None:
        return ()
    from pipelines.score import stage as score

    clip = (f"train.{recipe.score.clip}",) if recipe.score.clip in recipe.models else ()
    identify, run = partial(score.identity, recipe.score), partial(score.score, recipe.score)
    return (Node("score", ("acquire", *clip), score.FORMAT_VERSION, identify, run),)


def _model_nodes(recipe: Recipe) -> Sequence[Node]:
    nodes: list[Node] = []
    for name in recipe.models:
        model = recipe.model(name)
        if isinstance(model, TextToImageModel):
            nodes += _text_to_image_nodes(recipe, name, model)
        elif isinstance(model, ClipModel):
            # Before `select`, which may use its scores; which pairs it learns from is known without it.
            nodes.append(_train_node(name, model, ("acquire",)))
        else:
            nodes.append(_train_node(name, model, ("acquire", "select")))
    return nodes


def _train_node(name: str, model: Model, inputs: tuple[str, ...]) -> Node:
    from pipelines.train import stage as train

    identify, run = partial(train.identity, model), partial(train.train, name, model)
    return Node(f"train.{name}", inputs, train.FORMAT_VERSION, identify, run)


def _text_to_image_nodes(recipe: Recipe, name: str, model: TextToImageModel) -> Sequence[Node]:
    from pipelines.encode import stage as encode
    from pipelines.evaluate import stage as evaluate

    first_stage = f"train.{model.first_stage}"
    encoded = Node(
        f"encode.{name}",
        ("acquire", "select", first_stage),
        encode.FORMAT_VERSION,
        partial(encode.identity, model),
        partial(encode.encode, name, model),
    )
    evaluated = Node(
        f"evaluate.{name}",
        (f"train.{name}", first_stage, *_measured_against(recipe, model)),
        evaluate.FORMAT_VERSION,
        partial(evaluate.identity, model),
        partial(evaluate.evaluate, name, model),
    )
    return encoded, _train_node(name, model, (f"encode.{name}", first_stage)), evaluated


def _measured_against(recipe: Recipe, model: TextToImageModel) -> tuple[str, ...]:
    """What a model's figures need besides the model: real pairs, their features if there are, and the judge."""
    if model.evaluate is None:
        return ()
    features = recipe.score is not None and recipe.score.features == model.evaluate.extractor
    judge = model.evaluate.judge
    return (
        "acquire",
        "select",
        *(("score",) if features else ()),
        *((f"train.{judge}",) if judge in recipe.models else ()),
    )


def _release_node(recipe: Recipe) -> Sequence[Node]:
    from pipelines.release import stage as release

    if recipe.release is None:
        return ()
    model = recipe.models[recipe.release.model]
    assert isinstance(model, TextToImageModel)  # the recipe has checked it
    inputs = (f"evaluate.{recipe.release.model}", f"train.{recipe.release.model}", f"train.{model.first_stage}")
    identify = partial(release.identity, recipe.release, model)
    run = partial(release.release, recipe.release, model)
    return (Node("release", inputs, release.FORMAT_VERSION, identify, run, release.NEEDS_CLUSTER),)
