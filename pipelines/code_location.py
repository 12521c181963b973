"""What Dagster's page shows of a recipe: its graph as assets, and how each node stands. To look at, not to run.

A run needs Ray, MLflow and the terminal around it: `ldm run` brings them, and records itself under these same assets.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import dagster

    from pipelines.graph import Node
    from pipelines.plan import Row

RECIPE_VARIABLE = "LATENTWORKS_UI_RECIPE"


def definitions() -> dagster.Definitions:
    """The assets of the recipe file that the environment variable `LATENTWORKS_UI_RECIPE` names."""
    import dagster as dg

    from infra.storage import Store
    from pipelines.graph import build_graph
    from pipelines.plan import plan
    from pipelines.recipe_file import load_recipe

    recipe = load_recipe(os.environ[RECIPE_VARIABLE])
    nodes, store = build_graph(recipe), Store(recipe.store)
    rows = plan(nodes, store, recipe.name)
    return dg.Definitions([_asset(nodes[row.node], row, store, recipe.name) for row in rows])


def asset_key(node_name: str) -> str:
    """ "train_base": one word, because of more parts Dagster's page shows only the last, and takes no dots in it."""
    return node_name.replace(".", "_")


def _asset(node: Node, row: Row, store: Any, recipe_name: str) -> dagster.AssetSpec:
    import dagster as dg

    return dg.AssetSpec(
        key=asset_key(node.name),
        deps=[asset_key(name) for name in node.inputs],
        group_name=re.sub(r"\W", "_", recipe_name),  # one group: Dagster's page folds several
        description=f"Node `{node.name}` of recipe `{recipe_name}`. {row.state}: {row.why}.",
        metadata=_facts(row, store),
    )


def _facts(row: Row, store: Any) -> Mapping[str, Any]:
    """How it stood when the page was started."""
    facts: dict[str, Any] = {"state": row.state, "why": row.why}
    if row.artifact is not None:
        facts |= {
            "revision": row.artifact.revision,
            "location": store.location(row.artifact.path),
            "counts": row.artifact.counts.to_json(),
            "info": dict(row.artifact.info),
        }
    return facts
