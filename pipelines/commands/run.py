"""A recipe run for a person at a terminal: plan, progress, log file, summary."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from infra.logs import captured_output, start_logging, warnings_shown
from infra.storage import StorageError, Store
from pipelines.artifacts import ArtifactError
from pipelines.dataset.errors import DatasetError
from pipelines.pages.run import write_page
from pipelines.recipe import Recipe
from pipelines.results import RunResult
from pipelines.terminal import summary
from pipelines.terminal.live import TerminalReport, console_on
from pipelines.workflow import run as workflow

logger = logging.getLogger(__name__)


def dry_run(recipe: Recipe, until: str | None) -> None:
    """Print what would run and why; nothing is made, and no rebuild is asked for."""
    _, _, rows = workflow.prepare(recipe, until, ())
    summary.print_plan(rows, console_on(sys.stdout))


def run_recipe(recipe: Recipe, recipe_name: str, until: str | None, force: tuple[str, ...]) -> None:
    """Bring a recipe up to date, showing progress and at the end the summary."""
    nodes, store, rows = workflow.prepare(recipe, until, force)
    result = workflow.up_to_date(rows)
    if result is not None:
        console = console_on(sys.stdout)
        page = page_path(recipe)
        summary.print_summary(result, store, console, recipe_name, page if page.exists() else None)
        console.print("\nup to date: nothing was to do")
        return
    log_path = start_logging(Path(recipe.state_dir).resolve(), recipe.name)
    with captured_output(log_path) as stream:
        console = console_on(stream)
        console.print(f"[bold]{recipe.name}[/]: {recipe.description or 'a recipe'}", highlight=False)
        console.print(f"log: {log_path}", highlight=False, soft_wrap=True)
        summary.print_plan(rows, console)
        console.print()
        terminal = TerminalReport(stream)
        try:
            with warnings_shown(terminal.note):
                result = workflow.run(recipe, nodes, store, terminal)
        except BaseException:
            logger.exception("the run ended early")
            console.print(f"[red]stopped[/]; details in {log_path}", soft_wrap=True, highlight=False)
            raise
        summary.print_summary(result, store, console, recipe_name, written_page(result, store, recipe, recipe_name))


def page_path(recipe: Recipe) -> Path:
    """Where the summary of the recipe's latest run lies."""
    return Path(recipe.state_dir).resolve() / "summaries" / f"{recipe.name}.html"


def written_page(result: RunResult, store: Store, recipe: Recipe, recipe_name: str) -> Path | None:
    """A run that has done its work doesn't fail for want of its summary: what hinders it is logged."""
    path = page_path(recipe)
    try:
        write_page(result, store, recipe, path, recipe_name=recipe_name)
    except (OSError, StorageError, ArtifactError, DatasetError):
        logger.exception("the summary could not be written to %s", path)
        return None
    return path
