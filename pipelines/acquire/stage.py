"""Node `acquire`, or `acquire.<source>`: a source's pairs to shards and their ledgers. One Ray task makes one shard.

Shards that are published already are left as they are, so that running again is resuming. Of a shard that is to be
made, the rows that an earlier ledger knows are taken over from there: see `pipelines.acquire.reuse`.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from infra.storage import Store
from pipelines.acquire.earlier import all_of, uid_hashes
from pipelines.acquire.errors import NoImages, ShardFailed, SourceError
from pipelines.acquire.layout import Layout, Planned, earlier_rows, lay_out, reasons_asked, rows_of
from pipelines.acquire.record import TAKEN_OVER, made_with
from pipelines.acquire.retry import remedy
from pipelines.acquire.sources import rows_of_source, told_at
from pipelines.artifacts import Artifact, Counts, Identity, Unit
from pipelines.building import Build, find_or_build
from pipelines.recipe import AcquireSpec, Execution, NamedSource, Source
from pipelines.recipe.data_checks import check_allowed
from pipelines.recipe.problems import Findings
from pipelines.reporting import Report

if TYPE_CHECKING:
    from pipelines.acquire.shard import ShardTask

FORMAT_VERSION = 2
MAX_RETRIES = 2
"""How often a shard is begun anew whose worker died."""

logger = logging.getLogger(__name__)


def identity(spec: AcquireSpec, source: Source, name: str = "") -> Identity:
    """All of the recipe that affects the shards, with the content of the lists.

    `name` is the source's among several. Raises `SourceError` if a list or folder can't be used.
    """
    with told_at(NamedSource(name, source)):
        known, settings = rows_of_source(source).identity()
    return Identity(
        {"source": known, "acquire": _content(spec, source)},
        {"source": settings, "acquire": spec.model_dump(mode="json")},
    )


def acquire(
    spec: AcquireSpec,
    source: Source,
    inputs: Mapping[str, Artifact],
    store: Store,
    report: Report,
    execution: Execution,
    name: str = "",
) -> Artifact:
    """Download every URL of the source once, or read its files. A unit is a shard: `<shard>.tar`, and its ledger,
    `<shard>.parquet`. `name` is the source's among several.

    Needs a running Ray cluster (`infra.cluster`) if there is anything to do.

    Raises:
        SourceError: a list or folder can't be used or changes meanwhile, or the gallery is not among the allowed hosts.
        GalleryError: the gallery's port is taken, or its packages aren't installed.
        NoImages: nothing could be kept. The shards stay; no artifact is published.
        ShardFailed: a shard couldn't be made. The others stay.
    """
    named = NamedSource(name, source)
    findings = Findings()
    check_allowed(named, spec.fetch, findings)
    findings.raise_problems(SourceError, named.node)
    build = partial(_build, spec=spec, source=source, report=report, num_tasks=execution.acquire_tasks)
    how = execution.model_dump(mode="json")
    with told_at(named):
        return find_or_build(store, named.node, identity(spec, source), inputs, how, FORMAT_VERSION, build)


def _build(build: Build, spec: AcquireSpec, source: Source, report: Report, num_tasks: int) -> Artifact:
    content = {"settings": _content(spec, source, of_a_shard=True), "world": rows_of_source(source).world()}
    layout = lay_out(source, spec.shard_size, content, build)
    noun = rows_of_source(source).noun
    _tell_asked(layout, build, noun, report)
    if layout.missing:
        account = _Account(report, build.stage, noun, layout.num_rows, layout.units.values())
        with rows_of_source(source).served():
            for index, unit in _made(spec, source, layout, build, num_tasks):
                layout.units[index] = unit
                account.add(unit)
        account.close()
    _check_kept(layout.ordered, spec, noun, build)
    artifact = build.publish(layout.ordered)
    _tell(artifact, noun, report)
    return artifact


def _made(
    spec: AcquireSpec, source: Source, layout: Layout, build: Build, num_tasks: int
) -> Iterator[tuple[int, Unit]]:
    """Place and unit of each missing shard, as they are finished. Raises `ShardFailed`, `SourceError`.

    A shard whose rows are those of another comes after it, and takes them over from there.
    """
    from pipelines.acquire.shard import ShardTask

    origin = rows_of_source(source).origin()
    facts = made_with(spec, rows_of_source(source).world(), FORMAT_VERSION)
    earlier = earlier_rows(layout, facts, build)

    def tasks(missing: Mapping[int, Planned]) -> Iterator[tuple[int, ShardTask]]:
        for entry, rows in rows_of(source, spec.shard_size, missing):
            places, asked = None, reasons_asked(build)
            if entry.twin is not None:
                places, asked = all_of(layout.units[entry.twin]), ()
            elif earlier is not None:
                places = earlier.of(uid_hashes(rows.column("uid").to_pylist()))
            key, node = entry.unit_key, build.stage
            task = ShardTask(entry.name, key, rows, spec, build.store, origin, facts, places, asked, node)
            yield entry.index, task

    missing = layout.missing
    twins = {index: entry for index, entry in missing.items() if entry.twin is not None}
    for wave in ({index: entry for index, entry in missing.items() if index not in twins}, twins):
        if wave:
            yield from _run(tasks(wave), num_tasks)


def _run(tasks: Iterator[tuple[int, ShardTask]], num_tasks: int) -> Iterator[tuple[int, Unit]]:
    import ray

    from infra.tasks import Outcome, bounded
    from pipelines.acquire.shard import acquire_shard

    remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(acquire_shard)
    running = bounded(lambda item: remote.remote(item[1]), tasks, num_tasks)
    with contextlib.closing(cast("Generator[Outcome[tuple[int, ShardTask]]]", running)) as outcomes:
        for outcome in outcomes:
            index, task = outcome.item
            if outcome.error is not None:
                cause = getattr(outcome.error, "cause", None) or outcome.error
                raise ShardFailed(
                    f"shard {task.name} could not be made: {cause}; the finished ones are kept: run the same command"
                    " again to go on"
                ) from outcome.error
            yield index, outcome.value


class _Account:
    """Tells the report how far the shards have come, and at what rate."""

    def __init__(self, report: Report, node: str, noun: str, total: int, published: Iterable[Unit]) -> None:
        self._report = report
        self._node = node
        self._noun = noun
        self._total = total
        self._counts = sum((unit.counts for unit in published), Counts(0, 0))
        self._resumed_at = self._counts
        self._taken_over = 0
        self._started_s = time.monotonic()
        if self._counts.total:
            report.note(f"{node}: {self._counts.total} of {total} {noun} are done already")
        report.progress(self._counts.total, total, noun)

    def add(self, unit: Unit) -> None:
        self._counts += unit.counts
        self._taken_over += int(unit.info.get(TAKEN_OVER, 0))
        counts, duration_s = self._counts, time.monotonic() - self._started_s
        urls_per_s = (counts.total - self._resumed_at.total) / duration_s
        images_per_s = (counts.kept - self._resumed_at.kept) / duration_s
        outcomes = f"{counts.kept} kept, {counts.num_dropped} dropped, {counts.num_failed} failed"
        note = f"{outcomes}, {urls_per_s:.0f} {self._noun}/s"
        self._report.progress(counts.total, self._total, self._noun, note)
        figures = {
            "urls/kept": counts.kept,
            "urls/dropped": counts.num_dropped,
            "urls/failed": counts.num_failed,
            "urls_per_s": urls_per_s,
            "images_per_s": images_per_s,
        }
        self._report.metrics({name: float(value) for name, value in figures.items()}, step=counts.total)

    def close(self) -> None:
        made = self._counts.total - self._resumed_at.total
        if self._taken_over:
            self._report.note(f"{self._node}: {self._taken_over} of {made} {self._noun} were known from earlier shards")


def _tell_asked(layout: Layout, build: Build, noun: str, report: Report) -> None:
    reasons = ", ".join(reasons_asked(build))
    if reasons and not layout.asked:
        report.note(f"{build.stage}: none of {layout.num_rows} {noun} is to be asked for again ({reasons})")
    elif reasons:
        report.note(f"{build.stage}: {layout.asked} of {layout.num_rows} {noun} are asked for again ({reasons})")


def _tell(artifact: Artifact, noun: str, report: Report) -> None:
    counts = artifact.counts
    report.metrics({f"urls/dropped/{reason}": float(number) for reason, number in counts.dropped.items()})
    report.metrics({f"urls/failed/{reason}": float(number) for reason, number in counts.failed.items()})
    logger.info("acquired %d of %d %s: %s", counts.kept, counts.total, noun, _reasons(counts))


def _content(spec: AcquireSpec, source: Source, *, of_a_shard: bool = False) -> dict[str, Any]:
    """What affects shards, or one of them: no manners, and of `fetch` what applies to the source."""
    content = spec.content(exclude=frozenset({"shard_size"} if of_a_shard else ()))
    return content | {"fetch": rows_of_source(source).rules(spec.fetch)}


def _check_kept(units: Sequence[Unit], spec: AcquireSpec, noun: str, build: Build) -> None:
    """Raises `NoImages`. What was asked for again is done then, as it is when an artifact is published."""
    counts = sum((unit.counts for unit in units), Counts(0, 0))
    if counts.kept:
        return
    if build.again is not None:
        build.settle(units)
    raise NoImages(
        f"none of {counts.total} {noun} gave an image to keep ({_reasons(counts)}); the ledgers say why for"
        f" each: {build.store.location(units[0].only('.parquet'))}{remedy(units, spec)}"
    )


def _reasons(counts: Counts) -> str:
    return (
        ", ".join(f"{reason} {number}" for reason, number in {**counts.dropped, **counts.failed}.items()) or "no faults"
    )
