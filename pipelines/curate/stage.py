"""Node `select`: the ledgers of `acquire` to one selection. Reads ledgers only, never an image."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from infra.storage import Store
from pipelines.artifacts import Artifact, Build, Counts, Unit, building, finished, publish_unit
from pipelines.recipe import Execution, SelectSpec
from pipelines.report import Report

FORMAT_VERSION = 1
NODE = "select"

logger = logging.getLogger(__name__)


def identity(spec: SelectSpec) -> dict[str, Any]:
    """All of the recipe that affects a selection."""
    return spec.model_dump(mode="json")


def select(
    spec: SelectSpec, inputs: Mapping[str, Artifact], store: Store, report: Report, execution: Execution
) -> Artifact:
    """Choose among the pairs that `acquire` kept, and split them. One unit: selection.parquet and dropped.parquet.

    Raises:
        UnknownColumn: a rule names a column that the ledgers don't have.
        UnusableRule: a rule's value doesn't fit its operation or its column.
        NothingSelected: no pair is left to train on. In each case nothing is published.
    """
    acquired = inputs["acquire"]
    rules = identity(spec)
    used = {"acquire": acquired}
    found = finished(store, NODE, rules, used, FORMAT_VERSION)
    if found is not None:
        return found
    with building(store, NODE, rules, used, execution.model_dump(mode="json"), FORMAT_VERSION) as build:
        unit_key = build.unit_key({"rules": rules, "ledgers": _ledger_hashes(acquired)})
        unit = build.find_unit(unit_key) or _make(spec, acquired, build, unit_key, report)
        artifact = build.publish([unit], info=unit.info)
    _tell(artifact, report)
    return artifact


def _make(spec: SelectSpec, acquired: Artifact, build: Build, unit_key: str, report: Report) -> Unit:
    import pyarrow as pa

    from pipelines.curate.ledgers import kept_rows, ledger_schema
    from pipelines.curate.select import check_rules, choose, needed_columns

    schema = ledger_schema(acquired, build.store)
    check_rules(spec, dict(zip(schema.names, schema.types, strict=True)))
    tables = []
    for table in kept_rows(acquired, build.store, schema, needed_columns(spec)):
        tables.append(table)
        report.progress(len(tables), len(acquired.units), "ledgers")
    selection = choose(pa.concat_tables(tables), spec)
    kept, dropped = selection.selected.num_rows, selection.dropped.num_rows
    return publish_unit(
        build.store,
        NODE,
        unit_key,
        {"selection.parquet": _parquet(selection.selected), "dropped.parquet": _parquet(selection.dropped)},
        Counts(kept + dropped, kept, dropped=selection.reasons),
        info={"train": selection.side("train"), "held_out": selection.side("held_out")},
    )


def _ledger_hashes(acquired: Artifact) -> list[list[Any]]:
    return [
        [unit.info["shard"], entry.sha256]
        for unit in acquired.units
        for entry in unit.files
        if entry.name.endswith(".parquet")
    ]


def _tell(artifact: Artifact, report: Report) -> None:
    counts = artifact.counts
    sides = {side: int(artifact.info[side]) for side in ("train", "held_out")}
    report.metrics({f"pairs/{side}": float(count) for side, count in sides.items()})
    report.metrics({f"pairs/dropped/{reason}": float(count) for reason, count in counts.dropped.items()})
    if not sides["held_out"]:
        report.note("select: no pair is held out; raise select.split.held_out to have some to evaluate with")
    logger.info("selected %d of %d pairs: %s, dropped %s", counts.kept, counts.total, sides, dict(counts.dropped))


def _parquet(table: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())
