"""One shard, from rows to a published unit: what the list decides, what earlier ledgers know, and the rest fetched.

A plain function: what runs it, how many at once, and what to do if it dies, is the caller's matter. Nothing of it lies
outside a temporary folder until the unit is published.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from infra.storage import Store
from pipelines.acquire.earlier import Places
from pipelines.acquire.fetch import FetchResult
from pipelines.acquire.filter import judge_caption
from pipelines.acquire.origin import WEB, Origin
from pipelines.acquire.record import (
    FAULT_COLUMNS,
    MADE_WITH,
    MANNERS,
    STAGE,
    TAKEN_OVER,
    faults,
    manners_id,
    manners_of,
)
from pipelines.acquire.reuse import Taken, take_over
from pipelines.acquire.rows import ImageFacts, Row, fetched, unasked
from pipelines.acquire.scratch import scratch_folder
from pipelines.acquire.write import ShardWriter
from pipelines.artifacts import Unit, digest, file_sha256, find_unit
from pipelines.dataset.ledger import Reason, content_digest, count, ledger_schema
from pipelines.dataset.uid import sample_key
from pipelines.publishing import publish_unit
from pipelines.recipe import AcquireSpec

REPEATED = "the uid came before in this shard"


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs for one shard. `rows` has url, caption, uid and the source's further columns."""

    name: str
    unit_key: str
    rows: Any
    spec: AcquireSpec
    store: Store
    origin: Origin = WEB
    """Where the rows' images are read."""
    made_with: Mapping[str, Any] = field(default_factory=dict)
    """See `pipelines.acquire.record`."""
    earlier: Places | None = None
    """Where the rows were before."""
    asked: tuple[str, ...] = ()
    """Reasons for which rows are asked for again, whatever became of them earlier."""
    node: str = STAGE
    """That the unit is of."""


def acquire_shard(task: ShardTask) -> Unit:
    """Make and publish one shard. Safe to call again, and from any process.

    Raises `ShardFailed` if a row is lost or what it is read from has changed, `SourceError` if that isn't there,
    `StorageError` or `OSError` if something can't be written.
    """
    started_s = time.monotonic()
    with scratch_folder() as scratch:
        # make: nothing of it is seen outside the folder
        made = make(task, scratch)
        published = find_unit(task.store, task.node, task.unit_key)
        if published is not None:  # another worker was thought dead, and was not
            return published
        # describe: what the unit's record says of its content, and of how it was come by
        ledger = pq.read_table(made.ledger_path, use_threads=False)
        info = {
            "shard": task.name,
            "duration_s": round(time.monotonic() - started_s, 3),
            "content": digest([file_sha256(made.tar_path), content_digest(ledger)]),
            MADE_WITH: dict(task.made_with),
            MANNERS: faults(ledger.select(list(FAULT_COLUMNS)).to_pylist(), made.manners),
            TAKEN_OVER: made.taken_over,
        }
        # publish
        files: dict[str, Path | bytes] = {path.name: path for path in (made.tar_path, made.ledger_path)}
        return publish_unit(task.store, task.node, task.unit_key, files, count(ledger), info)


@dataclass(frozen=True)
class Made:
    """A shard's files, the number of rows that were taken over, and the manners that its rows name, by id."""

    tar_path: Path
    ledger_path: Path
    taken_over: int
    manners: Mapping[str, Mapping[str, Any]]


def make(task: ShardTask, folder: Path) -> Made:
    """Make the shard's tar and its ledger in `folder`, and nothing beyond. Raises as `acquire_shard` does."""
    schema = ledger_schema(task.rows.schema)
    shard = _Shard(task, ShardWriter(folder, task.name, schema, task.spec.image.encode_format, task.rows.num_rows))
    try:
        # rows that the list alone decides
        waiting = shard.judge_list()
        # rows that earlier ledgers know
        taken = Taken()
        if task.earlier is not None and waiting:
            taken = take_over(task.earlier, shard.rows, waiting, task.spec, task.store, task.asked, shard.add)
        # the rest is asked for
        waiting = [place for place in waiting if place not in taken.places]
        if waiting:
            shard.fetch(waiting, folder)
    except BaseException:
        shard.writer.discard()
        raise
    # complete: the tar and its ledger can be read
    shard.writer.close()
    manners = {**taken.manners, **shard.manners}
    return Made(shard.writer.tar_path, shard.writer.ledger_path, len(taken.places), manners)


class _Shard:
    """The rows of a shard on their way to its writer."""

    def __init__(self, task: ShardTask, writer: ShardWriter) -> None:
        self.writer = writer
        self.rows: list[Row] = task.rows.to_pylist()
        self._task = task
        manners = manners_of(task.spec.fetch)
        self._manners = manners_id(manners) if task.origin.is_web else None
        self.manners = {self._manners: manners} if self._manners is not None else {}
        for row in self.rows:
            row["key"] = sample_key(row["uid"])
            row["shard"] = task.name

    def add(self, place: int, result: Row, image: bytes | None) -> None:
        self.writer.add(place, {**self.rows[place], **result}, image)

    def judge_list(self) -> list[int]:
        """Write the rows for which nothing is to be asked; the places of the others.

        A tar holds a key once: of rows with one uid, the first whose caption will do stands for all.
        """
        waiting, seen = [], set()
        for place, row in enumerate(self.rows):
            reason = judge_caption(row["caption"], self._task.spec.filter)
            if reason is not None:
                self.add(place, unasked(reason, f"caption {row['caption']!r}: {reason}"), None)
            elif row["key"] in seen:
                self.add(place, unasked(Reason.REPEATED, REPEATED), None)
            else:
                seen.add(row["key"])
                waiting.append(place)
        return waiting

    def fetch(self, places: Sequence[int], folder: Path) -> None:
        """Ask for the rows at `places` where they are read, and write them. Raises as `acquire_shard` does."""
        from pipelines.acquire.download import download  # img2dataset is for what is fetched

        def write(
            index: int, fetch: FetchResult, image: ImageFacts, stored: Mapping[str, Any], encoded: bytes | None
        ) -> None:
            manners = self._manners if fetch.attempts else None
            self.add(places[index], fetched(fetch, image, stored, manners), encoded)

        stopped = threading.Event()
        rows, rules = [self.rows[place] for place in places], self._task.spec.fetch
        reader = self._task.origin.reader(rows, rules, stopped.wait)
        download([row["url"] for row in rows], self._task.spec, reader.fetch, write, folder, stopped)
        reader.check_unchanged()
