"""`ldm doctor`: which precision trains a recipe's models fastest on this machine."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from pipelines.commands.options import AllowPluginsOption, JsonOption, RecipeArgument, SetOption

if TYPE_CHECKING:
    from pipelines.train.steps import StepTimes

SAME = 1.05
"""Times as fast, up to which two precisions are called equal: runs differ by as much."""


def doctor(
    recipe: RecipeArgument,
    set_: SetOption = None,
    as_json: JsonOption = False,
    allow_plugins: AllowPluginsOption = False,
) -> None:
    """Time one training step of each model here in fp32 and in bf16, and say which to write as its precision.

    Takes up to half a minute a model, with a rank's threads and random inputs; run it on a machine that has nothing
    else to do. Nothing is downloaded or published.
    """
    from pipelines.recipe.file import checked_recipe
    from pipelines.terminal.live import console_on
    from pipelines.terminal.tables import Column, print_table
    from pipelines.train.steps import time_steps

    checked = checked_recipe(recipe, set_ or [], allow_plugins=allow_plugins).recipe
    found = {name: time_steps(checked, name) for name in checked.models}
    advice = {name: advised(name, times, checked.models[name].train.precision) for name, times in found.items()}
    if as_json:
        print(json.dumps({name: to_json(times) | {"advice": advice[name]} for name, times in found.items()}, indent=2))  # noqa: T201
        return
    columns = (
        Column("model"),
        Column("samples", right=True, keep=1),
        Column("on", keep=0),
        Column("fp32", right=True),
        Column("bf16", right=True),
    )
    rows = [
        (
            name,
            str(times.batch_size),
            _place(times),
            *(f"{1e3 * times.seconds[precision]:,.0f} ms" for precision in ("fp32", "bf16")),
        )
        for name, times in found.items()
    ]
    print_table(console_on(sys.stdout), columns, rows, list(advice.values()), "precision")


def _place(times: StepTimes) -> str:
    if times.device != "cpu":
        return times.device
    return "cpu, 1 thread" if times.threads == 1 else f"cpu, {times.threads} threads"


def to_json(times: StepTimes) -> dict[str, object]:
    """Times in seconds, and what they are of."""
    return {
        "device": times.device,
        "threads": times.threads,
        "batch_size": times.batch_size,
        "rounds": times.rounds,
        "seconds": times.seconds,
    }


def advised(name: str, times: StepTimes, written: str) -> str:
    """Which precision to write for the model `name`, whose recipe has `written`, and why."""
    better, gain = ("bf16", times.gain) if times.gain > 1 else ("fp32", 1 / times.gain)
    if gain < SAME:
        return f"{written} stays: both take the same time here"
    if better == written:
        return f"{written} stays: {gain:.2f} times as fast here"
    return f"write models.{name}.train.precision: {better}, {gain:.2f} times as fast here"
