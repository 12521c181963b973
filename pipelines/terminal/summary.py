"""What a person reads in the terminal about a recipe: its plan, its status, and the summary of a run."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.dataset.funnel import Funnel
from pipelines.recipe import Recipe
from pipelines.recipe.file import shipped_recipes
from pipelines.results import Row, RunResult
from pipelines.terminal.measured import sentences
from pipelines.terminal.words import duration, size

# How a person reads what the stages want remembered, most telling first.
FIGURES = {
    "held_out_psnr_db": "{:.1f} dB PSNR held out",
    "steps": "{:,} steps",
    "images": "{:,} images",
    "train": "{:,} train",
    "held_out": "{:,} held out",
    "captions_cut": "{:,} captions cut",
}
STATE_STYLE = {"up to date": "green", "to do": "yellow", "waiting": "dim"}


def print_plan(rows: Sequence[Row], console: Console) -> None:
    """One line a node: what would run, and why."""
    table = Table(box=None, pad_edge=False)
    for column in ("node", "state", "why"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row.node, f"[{STATE_STYLE[row.state]}]{row.state}[/]", row.why)
    console.print(table)


def print_status(rows: Sequence[Row], store: Store, console: Console) -> None:
    """How each node stands, with what is published."""
    table = Table(box=None, pad_edge=False)
    for column in ("node", "state", "revision", "in", "kept", "files", "time", "finished (UTC)", "figures"):
        table.add_column(column, overflow="fold")
    for row in rows:
        state = f"[{STATE_STYLE[row.state]}]{row.state}[/]"
        if row.artifact is None:
            table.add_row(row.node, state, "", "", "", "", "", "", row.why)
            continue
        manifest, counts = row.artifact.manifest, row.artifact.counts
        table.add_row(
            row.node,
            state,
            row.artifact.revision[:12],
            f"{counts.total:,}",
            f"{counts.kept:,}",
            f"{manifest['num_files']:,} ({size(manifest['size_bytes'])})",
            duration(manifest["duration_s"]),
            manifest["finished_at"].rstrip("Z").replace("T", " "),
            figures(row.artifact),
        )
    console.print(table)
    console.print(f"store: {store.url}")


def status_json(rows: Sequence[Row], store: Store, recipe: Recipe) -> dict[str, Any]:
    """The same for programs."""
    nodes = {}
    for row in rows:
        entry: dict[str, Any] = {"state": row.state, "why": row.why, "key": row.key}
        if row.artifact is not None:
            manifest = row.artifact.manifest
            entry |= {
                "revision": row.artifact.revision,
                "location": store.location(row.artifact.path),
                "counts": manifest["counts"],
                "started_at": manifest["started_at"],
                "finished_at": manifest["finished_at"],
                "duration_s": manifest["duration_s"],
                "num_files": manifest["num_files"],
                "size_bytes": manifest["size_bytes"],
                "metrics": numbers(row.artifact),
            }
        nodes[row.node] = entry
    return {"recipe": recipe.name, "store": store.url, "nodes": nodes}


def print_summary(
    result: RunResult, store: Store, console: Console, recipe_name: str, page: Path | None = None
) -> None:
    """Time and counts of each stage, what became of every URL, how good the models are, where to look, and what to do
    next. `page` is the summary as a page, if there is one."""
    console.print()
    console.print(_nodes_table(result))
    console.print()
    console.print(_funnel_table(result.funnel))
    console.print()
    for name, lines in measured(result).items():
        console.print(f"[bold]{name}[/]", highlight=False)
        for line in lines:
            console.print(f"  {line}", soft_wrap=True, highlight=False, markup=False)
        console.print()
    summary = {"summary": str(page)} if page is not None else {}
    for label, text in (summary | places(result, store)).items():
        console.print(f"[bold]{label:<10}[/] {text}", soft_wrap=True, highlight=False)
    console.print()
    console.print("[bold]next[/]")
    for command in next_commands(result, recipe_name):
        console.print(f"  {command}", soft_wrap=True, highlight=False)


def measured(result: RunResult) -> dict[str, list[str]]:
    """The figures of each evaluation in words, by node; none of a node without figures."""
    found = {name: sentences(node.artifact.info) for name, node in result.nodes.items() if name.startswith("evaluate.")}
    return {name: lines for name, lines in found.items() if lines}


def _nodes_table(result: RunResult) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("node", "time", "in", "kept", "dropped", "failed", "figures"):
        table.add_column(column, justify="left" if column in {"node", "figures"} else "right", overflow="fold")
    for name, node in result.nodes.items():
        counts = node.artifact.counts
        time = duration(node.duration_s) if node.made else "up to date"
        row = (name, time, f"{counts.total:,}", f"{counts.kept:,}", f"{counts.num_dropped:,}", f"{counts.num_failed:,}")
        table.add_row(*row, figures(node.artifact))
    if result.duration_s:
        table.add_row("[bold]in all[/]", f"[bold]{duration(result.duration_s)}[/]")
    return table


def _funnel_table(account: Funnel) -> Table:
    table = Table(box=None, pad_edge=False, title="What became of every URL", title_justify="left", title_style="bold")
    for column in ("stage", "outcome", "reason"):
        table.add_column(column)
    table.add_column("count", justify="right")
    for step in account.steps:
        table.add_row(step.node, "in", "", f"{step.total:,} {step.unit}")
        for outcome, reasons in (("dropped", step.dropped), ("failed", step.failed)):
            for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
                if count:
                    table.add_row("", outcome, reason, f"{count:,}")
        table.add_row("", "kept", "", f"{step.kept:,} {step.unit}")
    return table


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


def next_commands(result: RunResult, recipe_name: str) -> list[str]:
    """What to type next, as a person at a terminal would."""
    quoted = shlex.quote(recipe_name)
    commands = [f"ldm status {quoted}"]
    if shutil.which("ldm") is None:  # run by its path, as `make demo` does
        commands.insert(0, f". {shlex.quote(os.path.relpath(sys.prefix))}/bin/activate")
    if "release" in result.nodes:
        commands.append(f'ldm sample {quoted} --prompt "flag of Italy, noto style" --out outputs')
    if result.tracking_uri and result.tracking_uri.startswith("sqlite:"):
        commands.append(f"ldm ui {quoted}")
    if recipe_name in shipped_recipes():
        commands.append(f"ldm recipe copy {quoted} my.yaml   # then edit it: your own URLs, your own model")
    return commands


def figures(artifact: Artifact) -> str:
    """The artifact's own figures in a few words."""
    found = numbers(artifact)
    return ", ".join(text.format(found[name]) for name, text in FIGURES.items() if name in found)


def numbers(artifact: Artifact) -> dict[str, float]:
    """The figures among what the artifact's stage wanted remembered."""
    return {
        name: value
        for name, value in artifact.info.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
