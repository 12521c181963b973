"""What Dagster's page shows of a recipe: its graph as assets, and how each node stands. To look at, not to run.

A run needs Ray, MLflow and the terminal around it: `ldm run` brings them, and records itself under these same assets.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.logs import StateDirError

if TYPE_CHECKING:
    import dagster

    from pipelines.results import Row
    from pipelines.workflow.node import Node

RECIPE_VARIABLE = "LATENTWORKS_UI_RECIPE"


def definitions() -> dagster.Definitions:
    """The assets of the recipe file that the environment variable `LATENTWORKS_UI_RECIPE` names."""
    import dagster as dg

    from infra.storage import Store
    from pipelines.recipe.file import load_recipe
    from pipelines.workflow.graph import build_graph
    from pipelines.workflow.plan import plan

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


DAGSTER_YAML = """\
# Written by `ldm run`. Runs and events are kept in SQLite beside this file.
telemetry:
  enabled: false
nux:
  enabled: false
compute_logs:
  module: dagster._core.storage.noop_compute_log_manager
  class: NoOpComputeLogManager
"""


@contextlib.contextmanager
def dagster_instance(home: Path) -> Iterator[Any]:
    """Dagster's records in `home`. Raises `StateDirError` if they can't be made there."""
    import dagster as dg

    with contextlib.ExitStack() as opened:
        try:
            home.mkdir(parents=True, exist_ok=True)
            (home / "dagster.yaml").write_text(DAGSTER_YAML, encoding="utf-8")
            instance = opened.enter_context(dg.DagsterInstance.from_config(str(home)))
            instance.get_runs_count()  # makes the databases
        except Exception as error:
            if is_of_disk(error):
                raise StateDirError.of(home, error) from error
            raise
        yield instance


def is_of_disk(error: BaseException | None) -> bool:
    """Whether a disk, or a database on it, is at the bottom of it."""
    while error is not None:
        if isinstance(error, OSError | sqlite3.Error):
            return True
        error = error.__cause__ or error.__context__
    return False
