"""Node `report`: one self-contained HTML page on the data, for people to look at before they train on it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts, Identity, revisions
from pipelines.building import Build, find_or_build
from pipelines.dataset.acquired import acquired_of
from pipelines.publishing import publish_unit
from pipelines.recipe import Execution
from pipelines.reporting import Report

FORMAT_VERSION = 1
NEEDS_CLUSTER = False
NODE = "report"
PAGE = "report.html"


def identity() -> Identity:
    """All of the recipe that affects the page, apart from what it is on."""
    return Identity({}, {})


def report(inputs: Mapping[str, Artifact], store: Store, report: Report, execution: Execution) -> Artifact:
    """Write the page from `acquire`, `select`, and `score` if there is one. One unit: report.html.

    Equal inputs give equal bytes. Counts are of the pairs that `select` saw.

    Raises:
        pipelines.dataset.errors.UnusableImage: an image to be shown is missing or can't be decoded.
        infra.locks.Locked: another run is at it.
    """
    others = {name: inputs[name] for name in ("score", "select") if name in inputs}
    used = {**acquired_of(inputs).artifacts, **others}
    how = execution.model_dump(mode="json")
    return find_or_build(store, NODE, identity(), used, how, FORMAT_VERSION, partial(_build, report=report))


def _build(build: Build, report: Report) -> Artifact:
    store = build.store
    unit_key = build.unit_key(revisions(build.inputs))
    unit = build.find_unit(unit_key)
    if unit is None:
        from pipelines.report.document import write_document

        html = write_document(build.inputs, store, report)
        total = build.inputs["select"].counts.total
        unit = publish_unit(store, NODE, unit_key, {PAGE: html.encode()}, Counts(total, total))
    report.document(PAGE, store.read_bytes(unit.path(PAGE)).decode())
    return build.publish([unit])
