"""Arguments and options that several commands have, each described once."""

from __future__ import annotations

from typing import Annotated

import typer

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name or a YAML file.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a key of the recipe; repeatable.")
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
