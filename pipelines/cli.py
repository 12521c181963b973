"""The command line, `ldm`. Parses, calls, and ends with one message and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 3 refused by a gate, 130 interrupted.
Heavy libraries are imported where a command needs them, so that `ldm --help` answers at once.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.doctor import doctor
from pipelines.commands.options import (
    AllowPluginsOption,
    DryRunOption,
    ForceOption,
    JsonOption,
    RecipeArgument,
    RetryOption,
    SetOption,
    examples,
)
from pipelines.commands.recipe import recipe_app
from pipelines.commands.runs import runs
from pipelines.commands.sample.command import sample
from pipelines.commands.store import store_app
from pipelines.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, LatentworksError

INTERRUPTED = "interrupted; what was finished is kept: run the same command again to go on"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
OWN_PACKAGES = ("ldm", "infra", "configs", "pipelines")

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="ldm",
    epilog=examples("ldm run quickstart", 'ldm sample quickstart --prompt "red heart, twemoji style"'),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
app.add_typer(store_app, name="store")
app.add_typer(recipe_app, name="recipe")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(_version())  # noqa: T201
        raise typer.Exit


@app.callback()
def program(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version, and exit."),
    ] = False,
) -> None:
    """From lists of web image-text URLs to a released latent diffusion model."""


@app.command(epilog=examples("ldm run quickstart", "ldm run mine.yaml --set acquire.shard_size=500 --until report"))
def run(
    recipe: RecipeArgument,
    until: Annotated[str | None, typer.Option(metavar="NODE", help="Stop after this node or stage.")] = None,
    force: ForceOption = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    allow_plugins: AllowPluginsOption = False,
) -> None:
    """Bring a recipe up to date. To resume, run the same command again."""
    _run(recipe, set_, until, force, dry_run, allow_plugins=allow_plugins)


@app.command(epilog=examples("ldm status quickstart", "ldm status mine.yaml --json"))
def status(
    recipe: RecipeArgument,
    set_: SetOption = None,
    as_json: JsonOption = False,
    allow_plugins: AllowPluginsOption = False,
) -> None:
    """How each node stands: state, revision, counts, times, location, last metrics."""
    from pipelines.commands.status import show_status
    from pipelines.recipe.file import load_recipe
    from pipelines.results import Asked

    loaded = load_recipe(recipe, set_ or [], allow_plugins=allow_plugins)
    show_status(loaded, Asked(recipe, tuple(set_ or ())), as_json)


app.command(epilog=examples("ldm doctor quickstart"))(doctor)
app.command(epilog=examples("ldm runs quickstart", "ldm runs mine.yaml --last 5 --json"))(runs)
app.command(
    epilog=examples(
        'ldm sample quickstart --prompt "red heart, twemoji style" --seed 7',
        'ldm sample model.safetensors --prompt "a red apple" --out apples --count 4',
    )
)(sample)


@app.command(epilog=examples("ldm ui quickstart", "ldm ui mine.yaml --dagster-port 3071 --mlflow-port 5071"))
def ui(
    recipe: RecipeArgument,
    set_: SetOption = None,
    dagster_port: Annotated[int, typer.Option(min=1024, max=65535, help="On 127.0.0.1.")] = 3070,
    mlflow_port: Annotated[int, typer.Option(min=1024, max=65535, help="On 127.0.0.1.")] = 5070,
    allow_plugins: AllowPluginsOption = False,
) -> None:
    """Show Dagster's and MLflow's pages of a recipe on this machine, until Ctrl-C."""
    from pipelines.commands.ui import show
    from pipelines.recipe.file import load_recipe

    loaded = load_recipe(recipe, set_ or [], allow_plugins=allow_plugins)
    show(loaded, dagster_port, mlflow_port, lambda line: print(line, flush=True))  # noqa: T201


@app.command(epilog=examples("ldm acquire mine.yaml", "ldm acquire mine.yaml --retry transient"))
def acquire(
    recipe: RecipeArgument,
    force: ForceOption = None,
    retry: RetryOption = None,
    set_: SetOption = None,
    dry_run: DryRunOption = False,
    allow_plugins: AllowPluginsOption = False,
) -> None:
    """Short for `ldm run RECIPE --until acquire`; --retry fetches again what failed."""
    _run(recipe, set_, "acquire", force, dry_run, retry, allow_plugins=allow_plugins)


def _stage_command(stage: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument,
        force: ForceOption = None,
        set_: SetOption = None,
        dry_run: DryRunOption = False,
        allow_plugins: AllowPluginsOption = False,
    ) -> None:
        _run(recipe, set_, stage, force, dry_run, allow_plugins=allow_plugins)

    command.__doc__ = f"Short for `ldm run RECIPE --until {stage}`."
    return command


for _stage in ("score", "select", "report", "encode", "train", "evaluate", "release"):
    app.command(name=_stage, epilog=examples(f"ldm {_stage} quickstart", f"ldm {_stage} mine.yaml --dry-run"))(
        _stage_command(_stage)
    )


def _run(
    recipe: str,
    overrides: list[str] | None,
    until: str | None,
    force: list[str] | None,
    dry_run: bool,
    retry: str | None = None,
    *,
    allow_plugins: bool,
) -> None:
    from pipelines.recipe.file import checked_recipe

    checked = checked_recipe(recipe, overrides or [], allow_plugins=allow_plugins)
    for note in checked.notes:
        print(f"note: {note}")  # noqa: T201
    from pipelines.acquire.retry import reasons_of
    from pipelines.commands.run import dry_run as print_dry_run
    from pipelines.commands.run import run_recipe
    from pipelines.results import Asked

    do = print_dry_run if dry_run else run_recipe
    reasons = reasons_of(retry) if retry is not None else ()
    do(checked.recipe, Asked(recipe, tuple(overrides or ())), until, force or (), reasons)


def main() -> None:
    """Entry point of `ldm`."""
    code = answer()
    if code == EXIT_INTERRUPTED:
        # All is closed. What libraries do when the interpreter ends takes seconds, and nobody waits for it.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def answer() -> int:
    """Do what the command line says: every error becomes one message and an exit code."""
    in_the_way = _in_the_way()
    if in_the_way:
        return _fail(in_the_way, EXIT_FAILED)
    from infra.signals import interruptible

    try:
        with interruptible():
            code = app(standalone_mode=False) or 0
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, EXIT_INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - the outermost boundary: logged whole, shown as one message
        return _explain(error)
    # typer makes an exit code of a KeyboardInterrupt, and says nothing.
    return _fail(INTERRUPTED, code) if code == EXIT_INTERRUPTED else int(code)


def _version() -> str:
    """ "latentworks 0.1.0 (Python 3.11.2, torch 2.14.0)", from the packages' metadata: nothing is imported."""

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return f"latentworks {of('latentworks')} (Python {platform.python_version()}, torch {of('torch')})"


def _in_the_way() -> str | None:
    """What to say if another project's package of the same name would be imported in place of one of ours."""
    here = Path(__file__).resolve().parents[1]
    for name in OWN_PACKAGES:
        spec = importlib.util.find_spec(name)
        found = [Path(place).resolve() for place in (spec.submodule_search_locations or ()) if spec] if spec else []
        if here / name not in found:
            where = ", ".join(map(str, found)) or (spec.origin if spec else None) or "nowhere"
            return (
                f"the package `{name}` that Python finds is another project's ({where}), not ours ({here / name}):"
                " uninstall it or take its folder off PYTHONPATH, or install latentworks into an environment of its own"
            )
    return None


def _explain(error: Exception) -> int:
    logger.debug("failed", exc_info=error)
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, typer.Abort):
        return _fail(INTERRUPTED, EXIT_INTERRUPTED)
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
