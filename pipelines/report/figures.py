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
from pipelines.dataset.ledgers import kept_ledger, shard_of
from pipelines.dataset.scores import load_scores, score_columns
from pipelines.dataset.selection import read_selection
from pipelines.pages.page import Histogram, histogram

ORDERED = {"<", "<=", ">", ">="}
LENGTHS = {"min_chars", "max_chars"}


def histograms(acquired: Artifact, scored: Artifact | None, selected: Artifact, store: Store) -> list[Histogram]:
    """Of each score that is a number with a meaning, then of the captions' lengths."""
    selection = read_selection(selected, store, ["shard", "key"])
    dropped, rules = selected.counts.dropped, selected.manifest["spec"].get("where", [])
    charts = []
    for name in _floats(scored, store):
        assert scored is not None
        table = load_scores(scored, store, ["key", name])
        values = table.column(name).to_numpy()
        charts.append(histogram(name, values, _selected(table, selection), _rules(rules, name, ORDERED, dropped)))
    lengths, chosen = _caption_lengths(acquired, selection, store)
    charts.append(histogram("caption length", lengths, chosen, _rules(rules, "caption", LENGTHS, dropped)))
    return [chart for chart in charts if chart is not None]


def _floats(scored: Artifact | None, store: Store) -> list[str]:
    types: Mapping[str, Any] = {} if scored is None else score_columns(scored, store)
    return [name for name, column_type in types.items() if pa.types.is_floating(column_type)]


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


def _selected(table: Any, selection: Any) -> NDArray[np.bool_]:
    """Which rows of a table with shard and key are in the selection."""
    names = (pc.binary_join_element_wise(rows.column("shard"), rows.column("key"), "/") for rows in (table, selection))
    own, chosen = names
    found: NDArray[np.bool_] = pc.is_in(own, chosen.combine_chunks()).to_numpy()
    return found


def _caption_lengths(acquired: Artifact, selection: Any, store: Store) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Characters of each kept pair's caption, and whether it is selected."""
    lengths, chosen = [np.zeros(0)], [np.zeros(0, bool)]
    for unit in acquired.units:
        kept = kept_ledger(unit, store, ["key", "caption"])
        shard = pa.array([shard_of(unit)] * kept.num_rows, pa.string())
        lengths.append(pc.fill_null(pc.utf8_length(kept.column("caption").cast(pa.string())), 0).to_numpy())
        chosen.append(_selected(kept.append_column("shard", shard), selection))
    return np.concatenate(lengths), np.concatenate(chosen)
