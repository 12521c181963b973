"""The command line, `ldm`. Parses, calls, prints; the only place that does, with `pipelines.commands.sample.command`.

Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 3 refused by a gate, 130 interrupted.
Heavy libraries are imported where a command needs them, so that `ldm --help` answers at once.
"""

from __future__ import annotations

import errno
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.sample.command import sample
from pipelines.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, LatentworksError

INTERRUPTED = "interrupted; what was finished is kept: run the same command again to go on"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
OWN_PACKAGES = {"ldm", "pipelines", "infra"}

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="ldm",
    help="From lists of web image-text URLs to a released latent diffusion model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
recipe_app = typer.Typer(help="Look at recipes: list, show, validate, schema, copy.", no_args_is_help=True)
app.add_typer(recipe_app, name="recipe")

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name or a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a key of the recipe; repeatable.")
]
ForceOption = Annotated[
    list[str] | None, typer.Option("--force", metavar="NODE", help="Make this node anew; repeatable.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would run and why, and stop.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(
    recipe: RecipeArgument,
    until: Annotated[str | None, typer.Option(metavar="NODE", help="Stop after this node or stage.")] = None,
    force: ForceOption = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Bring a recipe up to date. To resume, run the same command again."""
    _run(recipe, until, force or [], set_ or [], dry_run)


def _stage_command(stage: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument, force: ForceOption = None, set_: SetOption = None, dry_run: DryRunOption = False
    ) -> None:
        _run(recipe, stage, force or [], set_ or [], dry_run)

    command.__doc__ = f"Short for `ldm run RECIPE --until {stage}`."
    return command


for _stage in ("acquire", "score", "select", "report", "encode", "train", "evaluate", "release"):
    app.command(name=_stage)(_stage_command(_stage))


@app.command()
def status(recipe: RecipeArgument, set_: SetOption = None, as_json: JsonOption = False) -> None:
    """How each node stands: state, revision, counts, times, location, last metrics."""
    from infra.storage import Store
    from pipelines.recipe.file import load_recipe
    from pipelines.terminal.live import console_on
    from pipelines.terminal.summary import print_status, status_json
    from pipelines.workflow.graph import build_graph
    from pipelines.workflow.plan import plan

    loaded = load_recipe(recipe, set_ or [])
    store = Store(loaded.store)
    rows = plan(build_graph(loaded), store, loaded.name)
    if as_json:
        print(json.dumps(status_json(rows, store, loaded), indent=2))  # noqa: T201
    else:
        print_status(rows, store, console_on(sys.stdout))


app.command()(sample)


@app.command()
def ui(
    recipe: RecipeArgument,
    set_: SetOption = None,
    dagster_port: Annotated[int, typer.Option(min=1024, max=65535, help="On 127.0.0.1.")] = 3070,
    mlflow_port: Annotated[int, typer.Option(min=1024, max=65535, help="On 127.0.0.1.")] = 5070,
) -> None:
    """Show Dagster's and MLflow's pages of a recipe on this machine, until Ctrl-C."""
    from pipelines.commands.ui import show
    from pipelines.recipe.file import load_recipe

    loaded = load_recipe(recipe, set_ or [])
    show(loaded, dagster_port, mlflow_port, lambda line: print(line, flush=True))  # noqa: T201


@recipe_app.command("list")
def recipe_list() -> None:
    """The recipes that come with the package."""
    from pipelines.recipe.file import load_recipe, shipped_recipes

    for name in shipped_recipes():
        print(f"{name:<16} {load_recipe(name).description}")  # noqa: T201


@recipe_app.command("show")
def recipe_show(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """The recipe in full, defaults included."""
    import yaml

    from pipelines.recipe.file import load_recipe

    resolved = load_recipe(recipe, set_ or []).model_dump(mode="json")
    print(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True), end="")  # noqa: T201


@recipe_app.command("validate")
def recipe_validate(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Check a recipe, and that its sources can be read."""
    from pipelines.recipe.file import load_recipe
    from pipelines.workflow.graph import build_graph

    loaded = load_recipe(recipe, set_ or [])
    print(f"{loaded.name}: valid; nodes: {', '.join(build_graph(loaded))}")  # noqa: T201


@recipe_app.command("schema")
def recipe_schema() -> None:
    """The JSON schema of recipes, with each key's meaning: for editors."""
    from pipelines.recipe import Recipe

    print(json.dumps(Recipe.model_json_schema(), indent=2))  # noqa: T201


@recipe_app.command("copy")
def recipe_copy(
    recipe: Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe's name.")],
    to: Annotated[Path, typer.Argument(metavar="FILE", help="Where to; an existing file is not overwritten.")],
) -> None:
    """Copy a shipped recipe to a file of your own, to change it."""
    from pipelines.recipe.errors import RecipeError
    from pipelines.recipe.file import recipe_text

    _, text = recipe_text(recipe)
    target = to / f"{recipe}.yaml" if to.is_dir() else to
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{target} exists; give another name, or remove it first") from None
    except OSError as error:
        raise RecipeError(f"can't write {target}: {error}") from error
    print(target)  # noqa: T201


def _run(recipe: str, until: str | None, force: list[str], overrides: list[str], dry_run: bool) -> None:
    from pipelines.recipe.file import load_recipe

    loaded = load_recipe(recipe, overrides)
    from pipelines.commands.run import dry_run as print_dry_run
    from pipelines.commands.run import run_recipe

    if dry_run:
        print_dry_run(loaded, until)
    else:
        run_recipe(loaded, recipe, until, tuple(force))


def main() -> None:
    """Entry point of `ldm`: every error becomes one message and an exit code."""
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        code = _fail(INTERRUPTED, EXIT_INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - the outermost boundary: logged whole, shown as one message
        code = _explain(error)
    sys.exit(code or 0)


def _explain(error: Exception) -> int:
    logger.debug("failed", exc_info=error)
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, typer.Abort):
        return _fail("interrupted", EXIT_INTERRUPTED)
    if isinstance(error, typer.TyperException):  # wrong usage: it draws its own message
        show = getattr(error, "show", None)
        if show is not None:
            show()
        return EXIT_USAGE
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        place = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror}{place}; make room, then run the same command again to go on", EXIT_FAILED)
    if isinstance(error, LatentworksError):
        return _fail(str(error) or INTERRUPTED, error.exit_code)
    kind = type(error)
    own = kind.__module__.partition(".")[0] in OWN_PACKAGES
    return _fail(str(error) if own else f"unexpected {kind.__name__}: {error}", EXIT_FAILED)


def _fail(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    main()
