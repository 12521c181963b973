"""A recipe run for a person at a terminal: plan, progress, log file, summary."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from infra.logs import captured_output, start_logging, warnings_shown
from infra.storage import StorageError, Store
from pipelines.artifacts import ArtifactError
from pipelines.commands.status import curable_rows
from pipelines.dataset.errors import DatasetError
from pipelines.errors import Interrupted
from pipelines.pages.summaries import newest_page, places, write_summary
from pipelines.recipe import Recipe
from pipelines.results import Asked, RunResult
from pipelines.terminal import status, summary
from pipelines.terminal.live import TerminalReport, console_on
from pipelines.workflow import run as workflow
from pipelines.workflow.here import check_here
from pipelines.workflow.records import recorded_run

logger = logging.getLogger(__name__)


def dry_run(
    recipe: Recipe, asked: Asked, until: str | None, force: Sequence[str] = (), retry: Sequence[str] = ()
) -> None:
    """Print what would run and why; nothing is made, and nothing is asked for.

    Raises `pipelines.workflow.here.NotHere` if this machine can't run it.
    """
    prepared = workflow.prepare(recipe, until, force, retry)
    console = console_on(sys.stdout)
    status.print_plan(prepared.rows, console)
    _print_notes(prepared, check_here(recipe, prepared.rows, prepared.store), asked, console)


def run_recipe(
    recipe: Recipe, asked: Asked, until: str | None, force: Sequence[str] = (), retry: Sequence[str] = ()
) -> None:
    """Bring a recipe up to date, showing progress and at the end the summary."""
    prepared = workflow.prepare(recipe, until, force, retry)
    result = workflow.up_to_date(prepared.rows)
    if result is not None:
        console = console_on(sys.stdout)
        summary.print_summary(result, prepared.store, console, recipe, asked, places(newest_page(recipe)))
        console.print("\nup to date: nothing was to do")
        return
    notes = check_here(recipe, prepared.rows, prepared.store)
    prepared = workflow.claim(prepared)
    log_path = start_logging(Path(recipe.state_dir).resolve(), recipe.name)
    with captured_output(log_path) as stream:
        console = console_on(stream)
        console.print(f"[bold]{recipe.name}[/]: {recipe.description or 'a recipe'}", highlight=False)
        console.print(f"log: {log_path}", highlight=False, soft_wrap=True)
        status.print_plan(prepared.rows, console)
        _print_notes(prepared, notes, asked, console)
        console.print()
        terminal = TerminalReport(stream)
        try:
            with (
                warnings_shown(terminal.note),
                recorded_run(prepared.store, recipe.name, asked.overrides, until, force, retry) as record,
            ):
                result = workflow.run(prepared, terminal, record.have)
        except (KeyboardInterrupt, Interrupted):
            logger.info("interrupted")
            raise
        except BaseException:
            logger.exception("the run ended early")
            console.print(f"[red]stopped[/]; details in {log_path}", soft_wrap=True, highlight=False)
            raise
        page = written_page(result, prepared.store, recipe, asked)
        summary.print_summary(result, prepared.store, console, recipe, asked, places(page))


def _print_notes(prepared: workflow.Prepared, notes: Sequence[str], asked: Asked, console: Console) -> None:
    """What is worth a look before a run, though it can be run."""
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False, markup=False)
    status.print_curable(curable_rows(prepared.rows, prepared.recipe), asked, console)


def written_page(result: RunResult, store: Store, recipe: Recipe, asked: Asked) -> Path | None:
    """A run that has done its work doesn't fail for want of its summary: what hinders it is logged."""
    try:
        return write_summary(result, store, recipe, asked)
    except (OSError, StorageError, ArtifactError, DatasetError):
        logger.exception("the summary could not be written into %s", recipe.state_dir)
        return None
