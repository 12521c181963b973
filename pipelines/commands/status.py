"""`ldm status`: how each node of a recipe stands."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from infra.storage import Store
from pipelines.acquire.retry import curable
from pipelines.dataset.acquired import is_acquired
from pipelines.recipe import Recipe
from pipelines.results import Asked, Row
from pipelines.terminal.live import console_on
from pipelines.terminal.status import print_curable, print_status, status_json
from pipelines.workflow.graph import build_graph
from pipelines.workflow.plan import plan
from pipelines.workflow.records import newest_runs


def show_status(recipe: Recipe, asked: Asked, as_json: bool) -> None:
    """Print it, for a person or for a program."""
    store = Store(recipe.store)
    rows = plan(build_graph(recipe), store, recipe.name)
    reasons = curable_rows(rows, recipe)
    if as_json:
        print(json.dumps(status_json(rows, store, recipe) | {"curable": reasons}, indent=2))  # noqa: T201
        return
    console = console_on(sys.stdout)
    print_status(rows, store, console)
    print_curable(reasons, asked, console)
    latest = next(newest_runs(store, recipe.name), None)
    if latest is not None and latest.overrides != asked.overrides and any(row.artifact is None for row in rows):
        command = Asked(asked.recipe, latest.overrides).command("status")
        console.print(f"the latest run had other settings: {command}", soft_wrap=True, highlight=False, markup=False)


def curable_rows(rows: Sequence[Row], recipe: Recipe) -> dict[str, int]:
    """Acquired rows, by reason, that failed under settings which have changed since: they may be had now."""
    acquired = [row.artifact for row in rows if row.artifact is not None and is_acquired(row.node)]
    return curable((unit for artifact in acquired for unit in artifact.units), recipe.acquire)
