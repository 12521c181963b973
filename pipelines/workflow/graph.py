"""The graph of a recipe: which stages it names, what each one reads, and what each one's key is made of.

It follows from the recipe alone: no source, no weights, no package is looked at before a key is asked for. The order of
stages is known here and in `pipelines.cli`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from graphlib import TopologicalSorter

from pipelines.errors import UnknownNode
from pipelines.recipe import Recipe
from pipelines.workflow.kinds import KINDS
from pipelines.workflow.kinds.kind import release_node
from pipelines.workflow.node import Node


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
    weights = {source.name: source.block.weight for source in recipe.named_sources if source.name}
    nodes = [
        *(
            Node(
                source.node,
                (),
                acquire.FORMAT_VERSION,
                partial(acquire.identity, recipe.acquire, source.block, source.name),
                partial(acquire.acquire, recipe.acquire, source.block, name=source.name),
            )
            for source in recipe.named_sources
        ),
        *_score_node(recipe),
        Node(
            "select",
            (*recipe.acquired, *scored),
            curate.FORMAT_VERSION,
            partial(curate.identity, recipe.select),
            partial(curate.select, recipe.select, weights=weights),
            curate.NEEDS_CLUSTER,
        ),
    ]
    if recipe.report:
        from pipelines.report import stage as dataset_report

        nodes.append(
            Node(
                "report",
                (*recipe.acquired, *scored, "select"),
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
    return (Node("score", (*recipe.acquired, *clip), score.FORMAT_VERSION, identify, run),)


def _model_nodes(recipe: Recipe) -> Sequence[Node]:
    models = {name: recipe.model(name) for name in recipe.models}
    return [node for name, model in models.items() for node in KINDS[model.kind].nodes(recipe, name, model)]


def _release_node(recipe: Recipe) -> Sequence[Node]:
    if recipe.release is None:
        return ()
    name = recipe.release.model
    model = recipe.model(name)
    released = KINDS[model.kind].released
    assert released is not None, "the recipe has checked that this kind is released"
    return (release_node(recipe.release, model, released(name, model)),)
