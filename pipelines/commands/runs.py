"""`ldm runs`: what was run of a recipe, and what became of it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.commands.options import AllowPluginsOption, JsonOption, RecipeArgument, SetOption

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.workflow.records import RunRecord

STATE_STYLE = {"done": "green", "running": "cyan", "failed": "red", "interrupted": "yellow", "killed": "red"}


def runs(
    recipe: RecipeArgument,
    last: Annotated[int, typer.Option(min=1, metavar="N", help="Only the newest N runs.")] = 20,
    set_: SetOption = None,
    as_json: JsonOption = False,
    allow_plugins: AllowPluginsOption = False,
) -> None:
    """The recipe's runs, the newest last: when, with which settings, what came of it, what was made."""
    import itertools

    from infra.storage import Store
    from pipelines.recipe.file import load_recipe
    from pipelines.terminal.live import console_on
    from pipelines.workflow.records import newest_runs

    loaded = load_recipe(recipe, set_ or [], allow_plugins=allow_plugins)
    store = Store(loaded.store)
    found = list(itertools.islice(newest_runs(store, loaded.name), last))[::-1]
    if as_json:
        print(json.dumps([run.to_json() for run in found], indent=2, ensure_ascii=False))  # noqa: T201
    elif found:
        print_runs(found, console_on(sys.stdout))
    else:
        print(f"no run of {loaded.name} is on record in {store.url}")  # noqa: T201


def print_runs(found: Sequence[RunRecord], console: Console) -> None:
    """A line a run, and below or beside it what was asked for and what came of it."""
    from rich.text import Text

    from pipelines.publishing import iso
    from pipelines.terminal.tables import Column, print_table
    from pipelines.terminal.words import duration

    columns = (
        Column("started (UTC)"),
        Column("result"),
        Column("time", right=True, keep=2),
        Column("release", keep=1),
    )
    rows = [
        (
            iso(run.started_s).rstrip("Z").replace("T", " "),
            Text(run.state, STATE_STYLE[run.state]),
            duration(run.duration_s),
            (run.release or "")[:12],
        )
        for run in found
    ]
    print_table(console, columns, rows, [_words(run) for run in found], "what")


def _words(run: RunRecord) -> str:
    """ "--set a=1 --until select; made acquire, select; error: ..."."""
    from pipelines.terminal.words import one_line

    options = [part for override in run.overrides for part in ("--set", override)]
    options += [part for node in run.force for part in ("--force", node)]
    options += ["--retry", ",".join(run.retry)] if run.retry else []
    options += ["--until", run.until] if run.until else []
    parts = [shlex.join(options)] if options else []
    if run.made:
        parts.append(f"made {', '.join(run.made)}")
    elif run.state == "done":
        parts.append("all was up to date")
    if run.error:
        parts.append(f"error: {run.error}")
    return one_line("; ".join(parts))
