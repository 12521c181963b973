"""How the nodes of a recipe stand, before a run and at any time: for people, and for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from infra.storage import Store
from pipelines.dataset.figures import figures_of, metrics_of, records
from pipelines.recipe import Recipe
from pipelines.results import Asked, Row
from pipelines.terminal.figures import figures, numbers
from pipelines.terminal.tables import Column, print_table
from pipelines.terminal.words import duration, size

STATE_STYLE = {"up to date": "green", "to do": "yellow", "waiting": "dim"}
PLAN = (Column("node"), Column("state"))
STATUS = (
    Column("node"),
    Column("state"),
    Column("revision", keep=2),
    Column("in", right=True, keep=3),
    Column("kept", right=True, keep=6),
    Column("files", right=True, keep=1),
    Column("time", right=True, keep=5),
    Column("finished (UTC)", keep=4),
)


def print_plan(rows: Sequence[Row], console: Console) -> None:
    """One line a node: what would run, and why."""
    cells = [(row.node, _state(row)) for row in rows]
    print_table(console, PLAN, cells, [row.why for row in rows], "why")


def print_status(rows: Sequence[Row], store: Store, console: Console) -> None:
    """How each node stands, with what is published."""
    words = [row.why if row.artifact is None else figures(row.artifact) for row in rows]
    print_table(console, STATUS, [_status(row) for row in rows], words, "figures")
    console.print(f"store: {store.url}", soft_wrap=True, highlight=False, markup=False)


def print_curable(reasons: Mapping[str, int], asked: Asked, console: Console) -> None:
    """The rows that may be had now, and how; nothing if there are none."""
    if reasons:
        told = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
        command = asked.command("acquire", "--retry", ",".join(reasons))
        line = (
            f"acquire: {sum(reasons.values()):,} rows could not be had under settings that have changed since"
            f" ({told}); ask for them again: {command}"
        )
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def status_json(rows: Sequence[Row], store: Store, recipe: Recipe) -> dict[str, Any]:
    """What `ldm status` tells, for programs."""
    nodes = {}
    for row in rows:
        entry: dict[str, Any] = {"state": row.state, "why": row.why, "key": row.key}
        if row.artifact is not None:
            manifest, own = row.artifact.manifest, figures_of(row.artifact)
            entry |= {
                "revision": row.artifact.revision,
                "location": store.location(row.artifact.path),
                "counts": manifest["counts"],
                "started_at": manifest["started_at"],
                "finished_at": manifest["finished_at"],
                "duration_s": manifest["duration_s"],
                "num_files": manifest["num_files"],
                "size_bytes": manifest["size_bytes"],
                "metrics": numbers(row.artifact) | metrics_of(own),
                "figures": records(own),
            }
        nodes[row.node] = entry
    return {"recipe": recipe.name, "store": store.url, "nodes": nodes}


def _status(row: Row) -> list[str | Text]:
    if row.artifact is None:
        return [row.node, _state(row), *[""] * (len(STATUS) - 2)]
    manifest, counts = row.artifact.manifest, row.artifact.counts
    return [
        row.node,
        _state(row),
        row.artifact.revision[:12],
        f"{counts.total:,}",
        f"{counts.kept:,}",
        f"{manifest['num_files']:,} ({size(manifest['size_bytes'])})",
        duration(manifest["duration_s"]),
        manifest["finished_at"].rstrip("Z").replace("T", " "),
    ]


def _state(row: Row) -> Text:
    return Text(row.state, STATE_STYLE[row.state])
