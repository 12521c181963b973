"""The selected samples of one shard: which they are, and their images out of its tar, in the order of their keys."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from infra.storage import Store
from pipelines.artifacts import Artifact, Unit, digest
from pipelines.dataset.errors import DatasetError
from pipelines.dataset.ledgers import TAR, read_ledger, shard_of
from pipelines.dataset.selection import read_selection

LEDGER_COLUMNS = ("key", "uid", "caption", "original_width", "original_height")


@dataclass(frozen=True)
class ShardTask:
    """One unit of work. `uids`, `keys` and `splits` are of the selected samples of the acquired shard `source`."""

    source: Unit
    uids: Sequence[str]
    keys: Sequence[str]
    splits: Sequence[str]
    unit_key: str = ""

    @property
    def shard(self) -> str:
        return shard_of(self.source)

    @property
    def num_images(self) -> int:
        return len(self.keys)

    @property
    def content(self) -> dict[str, str]:
        """What a unit is made from: the shard and its tar's hash, and which of its samples are on which side."""
        (tar,) = (entry for entry in self.source.files if entry.name.endswith(TAR))
        rows = [list(row) for row in zip(self.uids, self.keys, self.splits, strict=True)]
        return {"shard": self.shard, "tar": tar.sha256, "samples": digest(rows)}


@dataclass(frozen=True)
class Sample:
    uid: str
    key: str
    split: str
    caption: str
    original_width: int
    original_height: int


def shard_tasks(acquired: Artifact, selected: Artifact, store: Store) -> list[ShardTask]:
    """A task for each acquired shard, in their order; without samples where nothing of it was selected.

    Raises `DatasetError` if the selection lists a shard that isn't there.
    """
    rows = read_selection(selected, store, ["shard", "key", "uid", "split"])
    rows = rows.sort_by([("shard", "ascending"), ("key", "ascending")])
    shards = rows.column("shard").to_numpy(zero_copy_only=False).astype(str)
    columns = [rows.column(name) for name in ("uid", "key", "split")]
    tasks = []
    for unit in acquired.units:
        first, last = (int(np.searchsorted(shards, shard_of(unit), side)) for side in ("left", "right"))
        uids, keys, splits = (column.slice(first, last - first).to_pylist() for column in columns)
        tasks.append(ShardTask(unit, uids, keys, splits))
    missing = set(np.unique(shards).tolist()) - {task.shard for task in tasks}
    if missing:
        raise DatasetError(f"the selection lists shards {sorted(missing)[:5]}, which `acquire` did not publish")
    return tasks


def samples_of(task: ShardTask, store: Store) -> list[Sample]:
    """The task's samples with what the ledger knows of them. Raises `DatasetError` if it lacks one."""
    rows = read_ledger(task.source, store, LEDGER_COLUMNS, task.keys).to_pylist()
    samples = []
    for uid, key, split, row in zip(task.uids, task.keys, task.splits, rows, strict=True):
        if row["uid"] != uid:
            raise DatasetError(
                f"the selection lists sample {uid} as {key!r} of shard {task.shard}, whose ledger has {row['uid']}"
                " there; select again with `--force select`"
            )
        size = {name: int(row[name] or 0) for name in ("original_width", "original_height")}
        samples.append(Sample(uid, key, split, row["caption"] or "", **size))
    return samples


def sample_id(uid: str) -> int:
    """64 bits of the sample's uid, any string."""
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "little")
