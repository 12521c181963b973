"""What a person reads in the terminal at the end of a run: what was made, what became of every URL, what to do next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping

from rich.console import Console
from rich.text import Text

from infra.storage import Store
from pipelines.dataset.figures import figures_of
from pipelines.dataset.funnel import Funnel
from pipelines.recipe import Recipe
from pipelines.recipe.file import shipped_recipes
from pipelines.recipe.kinds import KINDS
from pipelines.results import Asked, RunResult
from pipelines.terminal.figures import figures
from pipelines.terminal.measured import sentences
from pipelines.terminal.tables import Column, print_table
from pipelines.terminal.words import duration

NODES = (
    Column("node"),
    Column("time", right=True),
    Column("in", right=True, keep=1),
    Column("kept", right=True, keep=4),
    Column("dropped", right=True, keep=2),
    Column("failed", right=True, keep=3),
)
FUNNEL = (Column("stage"), Column("outcome", keep=1), Column("reason"), Column("count", right=True))


def print_summary(
    result: RunResult,
    store: Store,
    console: Console,
    recipe: Recipe,
    asked: Asked,
    pages: Mapping[str, str] | None = None,
) -> None:
    """Time and counts of each stage, what became of every URL, how good the models are, where to look, and what to do
    next. `pages` are further places, by label: the summary as a page."""
    console.print()
    _print_nodes(result, console)
    console.print()
    _print_funnel(result.funnel, console)
    console.print()
    for name, lines in measured(result).items():
        console.print(f"[bold]{name}[/]", highlight=False)
        for line in lines:
            console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
        console.print()
    for label, text in (dict(pages or {}) | places(result, store)).items():
        console.print(Text(f"{label:<10} ", "bold") + Text(text, "not bold"), soft_wrap=True, highlight=False)
    console.print()
    console.print("[bold]next[/]")
    for command in next_commands(result, recipe, asked):
        console.print(f"  {command}", soft_wrap=True, highlight=False, markup=False)


def measured(result: RunResult) -> dict[str, list[str]]:
    """The figures of each evaluation in words, by node; none of a node without figures."""
    evaluations = {name: node.artifact for name, node in result.nodes.items() if name.startswith("evaluate.")}
    found = {name: sentences(figures_of(artifact)) for name, artifact in evaluations.items()}
    return {name: lines for name, lines in found.items() if lines}


def _print_nodes(result: RunResult, console: Console) -> None:
    rows: list[list[str | Text]] = []
    for name, node in result.nodes.items():
        counts = node.artifact.counts
        numbers = (counts.total, counts.kept, counts.num_dropped, counts.num_failed)
        time = duration(node.duration_s) if node.made else "up to date"
        rows.append([name, time, *(f"{number:,}" for number in numbers)])
    words = [figures(node.artifact) for node in result.nodes.values()]
    if result.duration_s:
        rows.append([Text("in all", "bold"), Text(duration(result.duration_s), "bold"), "", "", "", ""])
        words.append("")
    print_table(console, NODES, rows, words, "figures")


def _print_funnel(account: Funnel, console: Console) -> None:
    rows = []
    for step in account.steps:
        rows.append((step.node, "in", "", f"{step.total:,} {step.unit}"))
        for outcome, reasons in (("dropped", step.dropped), ("failed", step.failed)):
            for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
                if count:
                    rows.append(("", outcome, reason, f"{count:,}"))
        rows.append(("", "kept", "", f"{step.kept:,} {step.unit}"))
    console.print("[bold]What became of every URL[/]", highlight=False)
    print_table(console, FUNNEL, rows)


def places(result: RunResult, store: Store) -> dict[str, str]:
    """Where to look, by what is there."""
    found = {"store": store.url}
    for name, node in result.nodes.items():
        if name == "report":
            found["report"] = store.location(node.artifact.units[0].path("report.html"))
        if name.startswith("evaluate."):
            found["grid"] = store.location(node.artifact.units[0].path("grid.png"))
        if name == "release":
            found["model"] = store.location(node.artifact.units[0].path("model_index.json")).rpartition("/")[0]
    if result.tracking_uri:
        found["MLflow"] = result.tracking_uri
    return found


def next_commands(result: RunResult, recipe: Recipe, asked: Asked) -> list[str]:
    """What to type next, as a person at a terminal would; each command is about the recipe as it was asked for."""
    commands = [asked.command("status")]
    if shutil.which("ldm") is None:  # run by its path, as `make demo` does
        commands.insert(0, f". {shlex.quote(os.path.relpath(sys.prefix))}/bin/activate")
    if "release" in result.nodes and recipe.release is not None:
        model = recipe.models[recipe.release.model]
        sampling = KINDS[model.kind].sampling(model)
        if sampling is not None:
            commands.append(asked.command("sample", "--prompt", sampling.prompts[0], "--out", "outputs"))
    if result.tracking_uri and result.tracking_uri.startswith("sqlite:"):
        commands.append(asked.command("ui"))
    if asked.recipe in shipped_recipes():
        copy = shlex.join(["ldm", "recipe", "copy", asked.recipe, "my.yaml"])
        commands.append(f"{copy}   # then edit it: your own URLs, your own model")
    return commands
