"""Node `acquire`: URL lists, the gallery's own, or a folder to shards and their ledgers. One Ray task makes one shard.

Shards that are published already are left as they are, so that running again is resuming.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

from infra.storage import Store
from pipelines.acquire.addresses import AddressBook
from pipelines.acquire.errors import NoImages, ShardFailed, SourceError
from pipelines.acquire.folder import FOLDER_RULES, Folder
from pipelines.acquire.plan import gallery_of, rows_digest, shards, source_identity
from pipelines.artifacts import Artifact, Counts, Identity, Unit, finished
from pipelines.building import Build, building
from pipelines.gallery.server import serving
from pipelines.recipe import AcquireSpec, Execution, FolderSource, GallerySource, Source
from pipelines.reporting import Report

FORMAT_VERSION = 1
NODE = "acquire"
MAX_RETRIES = 2
"""How often a shard is begun anew whose worker died."""

logger = logging.getLogger(__name__)


def identity(spec: AcquireSpec, source: Source) -> Identity:
    """All of the recipe that affects the shards, with the content of the lists.

    Raises `SourceError` if a list or folder can't be used.
    """
    known = source_identity(source)
    settings = {"source": known, "acquire": spec.model_dump(mode="json")}
    return Identity({"source": known, "acquire": _settings(spec, source)}, settings)


def acquire(
    spec: AcquireSpec,
    source: Source,
    inputs: Mapping[str, Artifact],
    store: Store,
    report: Report,
    execution: Execution,
) -> Artifact:
    """Download every URL of the source once, or read its files. A unit is a shard: `<shard>.tar`, and its ledger,
    `<shard>.parquet`.

    Needs a running Ray cluster (`infra.cluster`) if there is anything to do.

    Raises:
        SourceError: a list or folder can't be used or changes meanwhile, or the gallery is not among the allowed hosts.
        GalleryError: the gallery's port is taken, or its packages aren't installed.
        NoImages: nothing could be kept. The shards stay; no artifact is published.
        ShardFailed: a shard couldn't be made. The others stay.
    """
    _check_allowed(spec, source)
    known = identity(spec, source)
    found = finished(store, NODE, known, inputs, FORMAT_VERSION)
    if found is not None:
        return found
    with building(store, NODE, known, inputs, execution.model_dump(mode="json"), FORMAT_VERSION) as build:
        plan = _planned(spec, source, build)
        units = {entry.index: unit for entry in plan if (unit := build.find_unit(entry.unit_key)) is not None}
        if len(units) < len(plan):
            missing = {entry.index: entry for entry in plan if entry.index not in units}
            account = _Account(report, _noun(source), sum(entry.num_rows for entry in plan), units.values())
            with _served(source):
                for unit in _made(spec, source, store, missing, execution.acquire_tasks):
                    units[int(unit.info["shard"])] = unit
                    account.add(unit)
        ordered = [units[entry.index] for entry in plan]
        _check_kept(ordered, _noun(source), store)
        artifact = build.publish(ordered)
    _tell(artifact, _noun(source), report)
    return artifact


@dataclass(frozen=True)
class _Planned:
    """A shard to be: its place, the key of its unit, digest and number of its rows."""

    index: int
    unit_key: str
    rows: str
    num_rows: int


def _planned(spec: AcquireSpec, source: Source, build: Build) -> list[_Planned]:
    """Reads the source once to know each shard by its content; keeps no rows."""
    settings = _settings(spec, source)
    served = _gallery_identity(source)
    plan = []
    for index, rows in enumerate(shards(source, spec.shard_size)):
        known = rows_digest(rows)
        unit_key = build.unit_key({"shard": index, "rows": known, "settings": settings, "gallery": served})
        plan.append(_Planned(index, unit_key, known, rows.num_rows))
    return plan


def _gallery_identity(source: Source) -> str | None:
    """The web's images are as they are at the time; the gallery's are known beforehand (a folder's are in its rows)."""
    return gallery_of(source).identity() if isinstance(source, GallerySource) else None


def _made(
    spec: AcquireSpec, source: Source, store: Store, missing: Mapping[int, _Planned], num_tasks: int
) -> Iterator[Unit]:
    """Units of the missing shards, as they are finished. Raises `ShardFailed`, `SourceError`."""
    import ray

    from infra.cluster import Outcome, bounded
    from pipelines.acquire.shard import ShardTask, acquire_shard

    remote = ray.remote(num_cpus=1, max_retries=MAX_RETRIES)(acquire_shard)
    folder = Folder(source.path).location if isinstance(source, FolderSource) else None
    tasks = (
        ShardTask(entry.index, entry.unit_key, rows, spec, store, folder)
        for entry, rows in _rows(spec, source, missing)
    )
    running = cast("Generator[Outcome[ShardTask]]", bounded(remote.remote, tasks, num_tasks))
    with contextlib.closing(running) as outcomes:
        for outcome in outcomes:
            if outcome.error is not None:
                cause = getattr(outcome.error, "cause", None) or outcome.error
                raise ShardFailed(
                    f"shard {outcome.item.name} could not be made: {cause}; the finished ones are kept: run the same"
                    " command again to go on"
                ) from outcome.error
            yield outcome.value


def _rows(spec: AcquireSpec, source: Source, missing: Mapping[int, _Planned]) -> Iterator[tuple[_Planned, Any]]:
    """The source again, for the rows of the missing shards. Raises `SourceError` if they aren't what was planned."""
    for index, rows in enumerate(shards(source, spec.shard_size)):
        if index not in missing:
            continue
        if rows_digest(rows) != missing[index].rows:
            raise SourceError("the source has changed since this run began: run the same command again to take it anew")
        yield missing[index], rows


class _Account:
    """Tells the report how far the shards have come, and at what rate."""

    def __init__(self, report: Report, noun: str, total: int, published: Iterable[Unit]) -> None:
        self._report = report
        self._noun = noun
        self._total = total
        self._counts = sum((unit.counts for unit in published), Counts(0, 0))
        self._resumed_at = self._counts
        self._started_s = time.monotonic()
        if self._counts.total:
            report.note(f"acquire: {self._counts.total} of {total} {noun} are done already")
        report.progress(self._counts.total, total, noun)

    def add(self, unit: Unit) -> None:
        self._counts += unit.counts
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


def _tell(artifact: Artifact, noun: str, report: Report) -> None:
    counts = artifact.counts
    report.metrics({f"urls/dropped/{reason}": float(number) for reason, number in counts.dropped.items()})
    report.metrics({f"urls/failed/{reason}": float(number) for reason, number in counts.failed.items()})
    logger.info("acquired %d of %d %s: %s", counts.kept, counts.total, noun, _reasons(counts))


def _noun(source: Source) -> str:
    return "files" if isinstance(source, FolderSource) else "URLs"


def _settings(spec: AcquireSpec, source: Source) -> dict[str, Any]:
    """What affects a shard's bytes: not how many requests are made at once, and no manners of the web for a folder."""
    fetch = spec.fetch.content()
    if isinstance(source, FolderSource):
        fetch = {name: value for name, value in fetch.items() if name in FOLDER_RULES}
    return spec.content() | {"fetch": fetch}


def _check_allowed(spec: AcquireSpec, source: Source) -> None:
    try:
        AddressBook(spec.fetch.allow_hosts)
    except ValueError as error:
        raise SourceError(str(error)) from error
    if isinstance(source, GallerySource) and gallery_of(source).authority not in spec.fetch.allow_hosts:
        authority = gallery_of(source).authority
        raise SourceError(
            f"the gallery is served on {authority}, which acquire.fetch.allow_hosts {list(spec.fetch.allow_hosts)}"
            f" doesn't name, and loopback is refused otherwise: add --set 'acquire.fetch.allow_hosts=[\"{authority}\"]'"
        )


def _served(source: Source) -> AbstractContextManager[None]:
    return serving(gallery_of(source)) if isinstance(source, GallerySource) else contextlib.nullcontext()


def _check_kept(units: Sequence[Unit], noun: str, store: Store) -> None:
    counts = sum((unit.counts for unit in units), Counts(0, 0))
    if not counts.kept:
        raise NoImages(
            f"none of {counts.total} {noun} gave an image to keep ({_reasons(counts)}); the ledgers say why for each:"
            f" {store.location(units[0].only('.parquet'))}"
        )


def _reasons(counts: Counts) -> str:
    return (
        ", ".join(f"{reason} {number}" for reason, number in {**counts.dropped, **counts.failed}.items()) or "no faults"
    )
