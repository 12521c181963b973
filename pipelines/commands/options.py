"""Arguments and options that several commands have, each described once, and how examples stand in the help."""

from __future__ import annotations

from typing import Annotated

import typer


def examples(*lines: str) -> str:
    """The end of a command's help: command lines as a person would type them. Each must parse as it stands."""
    return "\n".join(["[bold]Examples[/bold]", *lines])


def _shipped(incomplete: str) -> list[str]:
    """The shipped recipes whose names begin so, for completion; a shell goes on to files where there is none."""
    from pipelines.recipe.file import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="A shipped recipe's name or a YAML file.", autocompletion=_shipped),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a key of the recipe; repeatable.")
]
AllowPluginsOption = Annotated[
    bool,
    typer.Option(
        "--allow-plugins", help="Run the plugins of a recipe that is no local file, such as /dev/stdin: code, as you."
    ),
]
ForceOption = Annotated[
    list[str] | None, typer.Option("--force", metavar="NODE", help="Make this node anew; repeatable.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would run and why, and stop.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RetryOption = Annotated[
    str | None,
    typer.Option(
        "--retry",
        metavar="transient|failed|REASON,...",
        help="Fetch again what failed: for a while (transient), at all (failed), or for these reasons.",
    ),
]
