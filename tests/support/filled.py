"""Nodes of a recipe as a run would have published them, with next to nothing in them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts
from pipelines.building import building
from pipelines.publishing import publish_unit
from pipelines.recipe import Recipe
from pipelines.workflow.graph import build_graph
from pipelines.workflow.plan import remember


def filled(
    recipe: Recipe,
    names: Collection[str] | None = None,
    failed: Mapping[str, int] | None = None,
    files: Mapping[str, bytes] | None = None,
    info: Mapping[str, Any] | None = None,
) -> dict[str, Artifact]:
    """The named nodes, or all of them. `files` are in the last one's unit, `info` is on each unit's record."""
    store, found = Store(recipe.store), {}
    nodes = [node for node in build_graph(recipe).values() if names is None or node.name in names]
    for node in nodes:
        inputs = {name: found[name] for name in node.inputs}
        counts = Counts(9 + sum((failed or {}).values()), 9, {}, failed or {})
        with building(store, node.name, node.identity, inputs, {}, node.format_version) as build:
            unit_key = build.unit_key({"key": build.key})
            own = {"a": unit_key.encode()} | dict(files or {} if node is nodes[-1] else {})
            unit = publish_unit(store, node.name, unit_key, own, counts, {"shard": "a" * 16, **(info or {})})
            found[node.name] = build.publish([unit])
        remember(store, recipe.name, node.name, found[node.name])
    return found
