"""Histograms of a data set: its scores and the lengths of its captions, acquired beside selected, with the rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.dataset.acquired import Shards
from pipelines.dataset.ledgers import kept_rows_of
from pipelines.dataset.scores import Scores
from pipelines.dataset.selection import read_selection, rows_by_shard
from pipelines.pages.page import Histogram, histogram

ORDERED = {"<", "<=", ">", ">="}
LENGTHS = {"min_chars", "max_chars"}


def histograms(acquired: Shards, scored: Artifact | None, selected: Artifact, store: Store) -> list[Histogram]:
    """Histograms of each score that is a number with a meaning, then of the captions' lengths."""
    chosen = rows_by_shard(read_selection(selected, store, ["shard", "key"]))
    dropped, rules = selected.counts.dropped, selected.manifest["spec"].get("where", [])
    scores = Scores(scored, store)
    names = [name for name, column_type in scores.types.items() if pa.types.is_floating(column_type)]
    tables = {shard: scores.read(shard, names) for shard in scores.shards} if names else {}
    charts = []
    for name in names:
        values = np.concatenate([table.column(name).to_numpy() for table in tables.values()])
        stays = np.concatenate([_selected(table, chosen.get(shard)) for shard, table in tables.items()])
        charts.append(histogram(name, values, stays, _rules(rules, name, ORDERED, dropped)))
    lengths, stays = _caption_lengths(acquired, chosen, store)
    charts.append(histogram("caption length", lengths, stays, _rules(rules, "caption", LENGTHS, dropped)))
    return [chart for chart in charts if chart is not None]


def _rules(
    where: Sequence[Mapping[str, Any]], column: str, operations: set[str], dropped: Mapping[str, int]
) -> list[tuple[str, float]]:
    """Text and threshold of the predicates that can be drawn."""
    return [
        (
            f"{rule['name']}: {column} {rule['op']} {rule['value']} ({dropped.get(rule['name'], 0):,} dropped)",
            float(rule["value"]),
        )
        for rule in where
        if rule["column"] == column and rule["op"] in operations and isinstance(rule["value"], int | float)
    ]


def _selected(rows: Any, chosen: Any | None) -> NDArray[np.bool_]:
    """Which rows of a shard are among those chosen of it, if there are any."""
    if chosen is None:
        return np.zeros(rows.num_rows, bool)
    found: NDArray[np.bool_] = pc.is_in(rows.column("key"), chosen.column("key").combine_chunks()).to_numpy()
    return found


def _caption_lengths(
    acquired: Shards, chosen: Mapping[str, Any], store: Store
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Characters of each kept pair's caption, and whether it is selected."""
    lengths, stays = [np.zeros(0)], [np.zeros(0, bool)]
    for rows in kept_rows_of(acquired, store, ["key", "caption"]):
        lengths.append(pc.fill_null(pc.utf8_length(rows.table.column("caption").cast(pa.string())), 0).to_numpy())
        stays.append(_selected(rows.table, chosen.get(rows.shard)))
    return np.concatenate(lengths), np.concatenate(stays)
