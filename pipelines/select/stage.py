"""Node `select`: the ledgers of `acquire`, and the scores if there are any, to one selection. Reads no image."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts, Identity, Unit
from pipelines.building import Build, find_or_build
from pipelines.dataset.acquired import Acquired, acquired_of, source_name, source_of
from pipelines.dataset.facts import SOURCES, SplitFacts
from pipelines.dataset.figures import FIGURES, figures_of, metrics_of, records
from pipelines.dataset.ledgers import shard_of
from pipelines.dataset.selection import SIDES, rows_by_shard
from pipelines.publishing import publish_unit
from pipelines.recipe import Execution, SelectSpec
from pipelines.reporting import Report

if TYPE_CHECKING:
    from pipelines.dataset.scores import Scores
    from pipelines.select.select import Selection

FORMAT_VERSION = 2
NEEDS_CLUSTER = False
NODE = "select"

logger = logging.getLogger(__name__)


def identity(spec: SelectSpec) -> Identity:
    """All of the recipe that affects a selection."""
    return Identity(spec.content(), spec.model_dump(mode="json"))


def select(
    spec: SelectSpec,
    inputs: Mapping[str, Artifact],
    store: Store,
    report: Report,
    execution: Execution,
    weights: Mapping[str, float] | None = None,
) -> Artifact:
    """Choose among the pairs that `acquire` kept, and split them. One unit: selection.parquet and dropped.parquet, and
    near_duplicates.parquet if the rules ask for it.

    Its `info` has the means of the scores and a distance of image features, of the selected beside the acquired pairs:
    what the selection costs and brings. They are no part of its content. Of several sources it has what of each was
    selected, beside its weight in `weights` (`dataset.facts.SourceFacts`).

    Raises:
        UnknownColumn: a rule names a column that neither ledgers nor scores have.
        UnusableRule: a rule's value doesn't fit its operation or its column.
        NothingSelected: no pair is left to train on. In each case nothing is published.
    """
    scored = {name: inputs[name] for name in ("score",) if name in inputs}
    used = {**acquired_of(inputs).artifacts, **scored}
    build = partial(_build, spec=spec, report=report, weights=weights or {})
    how = execution.model_dump(mode="json")
    return find_or_build(store, NODE, identity(spec), used, how, FORMAT_VERSION, build)


def _build(build: Build, spec: SelectSpec, report: Report, weights: Mapping[str, float]) -> Artifact:
    content = {"rules": build.identity.content}
    unit_key = build.unit_key(content | {name: _contents(artifact) for name, artifact in build.inputs.items()})
    unit = build.find_unit(unit_key) or _make(spec, build, unit_key, report)
    info = dict(unit.info)
    if SOURCES in info:
        info[SOURCES] = {name: {**own, "weight": weights.get(name, 1.0)} for name, own in info[SOURCES].items()}
    artifact = build.publish([unit], info=info)
    _tell(artifact, report)
    return artifact


def _make(spec: SelectSpec, build: Build, unit_key: str, report: Report) -> Unit:
    from pipelines.dataset.scores import Scores
    from pipelines.dataset.selection import DROPPED, NEAR_DUPLICATES, SELECTION
    from pipelines.dataset.tables import table_bytes
    from pipelines.select.scores import averaged, feature_distance, means, score_types
    from pipelines.select.select import choose

    scored = build.inputs.get("score")
    scores = Scores(scored, build.store)
    selection = choose(_rows(spec, build, scores, report), spec)
    kept, dropped = selection.selected.num_rows, selection.dropped.num_rows
    info: dict[str, Any] = SplitFacts(train=selection.side("train"), held_out=selection.side("held_out")).info()
    info |= _by_source(selection, acquired_of(build.inputs))
    distance = [] if scored is None else feature_distance(selection.selected, scored, build.store)
    info[FIGURES] = records([*distance, *means(selection, averaged(score_types(scores)))])
    files: dict[str, Path | bytes] = {
        SELECTION: table_bytes(selection.selected),
        DROPPED: table_bytes(selection.dropped),
    }
    if selection.near_duplicates is not None:
        files[NEAR_DUPLICATES] = table_bytes(selection.near_duplicates)
    return publish_unit(
        build.store, NODE, unit_key, files, Counts(kept + dropped, kept, dropped=selection.reasons), info=info
    )


def _rows(spec: SelectSpec, build: Build, scores: Scores, report: Report) -> Any:
    """Every kept pair with what the rules need of its ledger and its scores, and the scores that are averaged."""
    import pyarrow as pa

    from pipelines.dataset.ledgers import in_common, kept_rows_of
    from pipelines.select.scores import averaged, score_types, with_scores
    from pipelines.select.select import check_rules, needed_columns

    acquired, types, needed = acquired_of(build.inputs), score_types(scores), needed_columns(spec)
    of_ledgers = [name for name in needed if name not in types]
    ledgers = []
    for ledger in kept_rows_of(acquired, build.store, of_ledgers):
        ledgers.append(ledger)
        report.progress(len(ledgers), len(acquired.units), "ledgers")
    schema = in_common(ledger.schema for ledger in ledgers)
    check_rules(spec, dict(zip(schema.names, schema.types, strict=True)) | types)
    tables = (ledger.of(schema, of_ledgers) for ledger in ledgers)
    wanted = [name for name in types if name in needed or name in averaged(types)]
    return pa.concat_tables(with_scores(tables, scores, wanted) if wanted else tables)


def _by_source(selection: Selection, acquired: Acquired) -> dict[str, Any]:
    """Rows of each source on either side, beside those that were acquired; nothing of a recipe's one `source`."""
    sources = {shard_of(unit): source_of(unit) for unit in acquired.units}
    found = {
        source_name(node): {"pairs": artifact.counts.kept, **dict.fromkeys(SIDES, 0)}
        for node, artifact in acquired.artifacts.items()
        if source_name(node)
    }
    for shard, rows in rows_by_shard(selection.selected).items():
        if sources[shard]:
            for side in SIDES:
                found[sources[shard]][side] += rows.column("split").to_pylist().count(side)
    return {SOURCES: found} if found else {}


def _contents(artifact: Artifact) -> list[list[Any]]:
    """Of each shard, without what varies from run to run: equal ledgers and scores make one and the same unit."""
    return [[shard_of(unit), unit.digest] for unit in artifact.units]


def _tell(artifact: Artifact, report: Report) -> None:
    counts = artifact.counts
    sides = SplitFacts.of(artifact).info()
    report.metrics({f"pairs/{side}": float(count) for side, count in sides.items()})
    report.metrics(metrics_of(figures_of(artifact)))
    report.metrics({f"pairs/dropped/{reason}": float(count) for reason, count in counts.dropped.items()})
    if not sides["held_out"]:
        report.note("select: no pair is held out; raise select.split.held_out to have some to evaluate with")
    logger.info("selected %d of %d pairs: %s, dropped %s", counts.kept, counts.total, sides, dict(counts.dropped))
