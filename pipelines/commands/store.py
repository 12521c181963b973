"""`ldm store`: is what a recipe has published still what was written, and what in its store does nothing need?"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.commands.options import AllowPluginsOption, JsonOption, RecipeArgument, SetOption, examples
from pipelines.errors import EXIT_FAILED, LatentworksError

if TYPE_CHECKING:
    from rich.console import Console

    from infra.storage import Store
    from pipelines.recipe import Recipe
    from pipelines.workflow.collection import Doomed
    from pipelines.workflow.repair import Cost
    from pipelines.workflow.verification import NodeCheck, Progress

MAX_LISTED = 20
"""Damaged files of one node that a person is told of; programs are told of all."""

store_app = typer.Typer(help="Look after a store: verify, gc.", no_args_is_help=True)


class NothingPublished(LatentworksError):
    """There is nothing of the recipe in the store: perhaps it is another store that was meant."""


@store_app.command(epilog=examples("ldm store verify quickstart", "ldm store verify quickstart --repair"))
def verify(
    recipe: RecipeArgument,
    repair: Annotated[
        bool, typer.Option("--repair", help="Mend what the rest says, and have the other units made again.")
    ] = False,
    set_: SetOption = None,
    as_json: JsonOption = False,
    allow_plugins: AllowPluginsOption = False,
) -> None:
    """Read all that the recipe's nodes have published and compare it with what was written.

    Ends with 1 if anything is damaged and not repaired.
    """
    from pipelines.results import Asked
    from pipelines.terminal.live import console_on
    from pipelines.workflow import verification
    from pipelines.workflow.repair import cost
    from pipelines.workflow.repair import repair as mend

    loaded, store = _opened(recipe, set_, allow_plugins)
    console = console_on(sys.stdout)
    checks: list[NodeCheck] = []
    with _progress() as progress:
        for check in verification.verify(_nodes(loaded), store, loaded.name, progress):
            checks.append(check)
            if not as_json:
                _print_check(check, store, console)
    if not any(check.revision or check.damages for check in checks) and not store.listdir(f"recipes/{loaded.name}"):
        raise NothingPublished(
            f"nothing of {loaded.name} is published in {store.url}: is it another store (recipe key `store`)?"
        )
    damaged = [check for check in checks if check.damages]
    costs = [cost(store, check) for check in damaged]
    run = Asked(recipe, tuple(set_ or ())).command("run")
    if as_json:
        print(json.dumps(_verified_json(checks, costs, store, loaded, repair), indent=2))  # noqa: T201
    elif damaged:
        _print_costs(costs, run, console, repair)
    if damaged and repair:
        mend(store, damaged)
    elif damaged:
        raise typer.Exit(EXIT_FAILED)


@store_app.command(
    epilog=examples("ldm store gc quickstart --dry-run", "ldm store gc quickstart --keep 1 --unfinished")
)
def gc(
    recipe: RecipeArgument,
    keep: Annotated[
        int, typer.Option(min=1, metavar="N", help="Runs of each recipe in the store whose results stay.")
    ] = 3,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also what was interrupted, and is older than a day.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and stop.")] = False,
    set_: SetOption = None,
    allow_plugins: AllowPluginsOption = False,
) -> None:
    """Delete what no kept run, release or unfinished work needs, and is older than a day.

    All recipes that share the store are looked at: what the newest runs of any of them had stays.
    """
    import contextlib

    from pipelines.terminal.live import console_on
    from pipelines.terminal.words import size
    from pipelines.workflow import collection
    from pipelines.workflow.plan import plan

    loaded, store = _opened(recipe, set_, allow_plugins)
    nodes = _nodes(loaded)
    console = console_on(sys.stdout)
    with contextlib.nullcontext() if dry_run else collection.collecting(store):
        rows = plan(nodes, store, loaded.name)
        current = [row.artifact for row in rows if row.artifact is not None]
        found = collection.doomed(store, nodes, current, keep, unfinished, time.time())
        _print_doomed(found, console)
        total = size(sum(entry.size_bytes for entry in found))
        if dry_run or all(entry.is_empty for entry in found):
            console.print(f"{total} could be deleted" if dry_run else "nothing to delete", highlight=False)
            return
        left = collection.collect(store, found)
        freed = size(sum(entry.size_bytes for entry in found if entry.node not in left))
        console.print(f"{freed} deleted", highlight=False)
        if left:
            console.print(f"left alone, as a run is at them by now: {', '.join(left)}", highlight=False)


def _opened(recipe: str, overrides: Sequence[str] | None, allow_plugins: bool) -> tuple[Recipe, Store]:
    from infra.storage import Store
    from pipelines.recipe.file import load_recipe

    loaded = load_recipe(recipe, list(overrides or ()), allow_plugins=allow_plugins)
    return loaded, Store(loaded.store)


def _nodes(recipe: Recipe) -> Any:
    from pipelines.workflow.graph import build_graph

    return build_graph(recipe)


# -- verify ------------------------------------------------------------------------------------------------------------


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar for the node that is read, where somebody watches."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("units"))
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        tasks: dict[str, Any] = {}

        def show(node: str, done: int, total: int) -> None:
            if node not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[node] = bar.add_task(node, total=total)
            bar.update(tasks[node], completed=done)

        yield show


def _print_check(check: NodeCheck, store: Store, console: Console) -> None:
    from rich.text import Text

    from pipelines.terminal.words import size
    from pipelines.workflow.repair import several

    style = {"sound": "green", "damaged": "red", "to do": "yellow", "waiting": "dim"}[check.state]
    line = Text(f"{check.node:<20} ") + Text(check.state, style)
    if check.revision is not None:
        files = f"{several(check.num_files, 'file')}, {size(check.size_bytes)}"
        line += Text(f"  revision {check.revision[:12]}, {several(len(check.units), 'unit')}, {files}")
    elif check.why:
        line += Text(f"  {check.why}")
    console.print(line, soft_wrap=True, highlight=False)
    for damage in check.damages[:MAX_LISTED]:
        console.print(Text(f"  {store.location(damage.path)}: {damage.what}"), soft_wrap=True, highlight=False)
    if len(check.damages) > MAX_LISTED:
        console.print(f"  and {len(check.damages) - MAX_LISTED:,} more (--json has all)", highlight=False)
    for path in check.strays[:MAX_LISTED]:
        console.print(Text(f"  {store.location(path)}: not published, and read by nobody"), soft_wrap=True)
    if len(check.strays) > MAX_LISTED:
        console.print(f"  and {len(check.strays) - MAX_LISTED:,} more of these (--json has all)", highlight=False)


def _print_costs(costs: Sequence[Cost], run: str, console: Console, repair: bool) -> None:
    """What a repair asks for, and the commands: `run` is that of the recipe with its settings."""
    from rich.text import Text

    console.print("\n[bold]repairing:[/]" if repair else "\n[bold]a repair would mean:[/]", highlight=False)
    for one in costs:
        console.print(Text(f"  {one.node}: {one.words}"), soft_wrap=True, highlight=False)
    commands = [run] if repair else [f"{run.replace('ldm run', 'ldm store verify', 1)} --repair", run]
    for command in commands:
        console.print(Text(f"now run:  {command}"), soft_wrap=True, highlight=False)


def _verified_json(
    checks: Sequence[NodeCheck], costs: Sequence[Cost], store: Store, recipe: Recipe, repair: bool
) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        "store": store.url,
        "sound": not any(check.damages for check in checks),
        "repaired": repair and any(check.damages for check in checks),
        "nodes": [
            {
                "node": check.node,
                "state": check.state,
                "why": check.why,
                "key": check.key,
                "revision": check.revision,
                "num_units": len(check.units),
                "num_files": check.num_files,
                "size_bytes": check.size_bytes,
                "strays": check.strays,
                "damaged": [
                    {"path": damage.path, "what": damage.what, "unit": damage.unit} for damage in check.damages
                ],
            }
            for check in checks
        ],
        "repair": [
            {"node": one.node, "units": one.units, "rows": one.rows, "files_restored": one.restored, "words": one.words}
            for one in costs
        ],
    }


# -- gc ----------------------------------------------------------------------------------------------------------------


def _print_doomed(found: Sequence[Doomed], console: Console) -> None:
    from rich.text import Text

    from pipelines.terminal.words import size
    from pipelines.workflow.repair import several

    for entry in found:
        kinds = {
            "revision": entry.revisions,
            "unit": entry.units,
            "folder of checkpoints": entry.unfinished,
            "build begun": entry.begun,
            "file never finished": entry.parts,
        }
        parts = [several(len(names), kind) for kind, names in kinds.items() if names]
        if parts:
            line = f"{entry.node:<20} {size(entry.size_bytes):>8}  {', '.join(parts)}"
            console.print(Text(line), soft_wrap=True, highlight=False)
        stays = list(entry.stays)
        if entry.unfinished_bytes:
            stays.append(f"{size(entry.unfinished_bytes)} of interrupted work (--unfinished deletes it)")
        for words in stays:
            console.print(Text(f"{entry.node:<20} stays: {words}", "dim"), soft_wrap=True, highlight=False)
