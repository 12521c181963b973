"""The selected samples of one shard: which they are, and their images out of its tar, in the order of their keys."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infra.storage import Store
from pipelines.artifacts import Artifact, Unit, digest
from pipelines.encode.errors import EncodeError, UnusableImage

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
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
    def shard(self) -> int:
        return int(self.source.info["shard"])

    @property
    def num_images(self) -> int:
        return len(self.keys)

    @property
    def content(self) -> dict[str, str | int]:
        """What a unit is made from: the shard and its tar's hash, and which of its samples are on which side."""
        (tar,) = (entry for entry in self.source.files if entry.name.endswith(".tar"))
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

    Raises `EncodeError` if the selection lists a shard that isn't there.
    """
    with store.open(selected.units[0].path("selection.parquet")) as file:
        rows = pq.read_table(file, columns=["shard", "key", "uid", "split"])
    rows = rows.sort_by([("shard", "ascending"), ("key", "ascending")])
    shards = rows.column("shard").to_numpy()
    columns = [rows.column(name) for name in ("uid", "key", "split")]
    tasks = []
    for unit in acquired.units:
        first, last = np.searchsorted(shards, [int(unit.info["shard"]), int(unit.info["shard"]) + 1])
        uids, keys, splits = (column.slice(first, last - first).to_pylist() for column in columns)
        tasks.append(ShardTask(unit, uids, keys, splits))
    missing = set(np.unique(shards).tolist()) - {task.shard for task in tasks}
    if missing:
        raise EncodeError(f"the selection lists shards {sorted(missing)[:5]}, which `acquire` did not publish")
    return tasks


def samples_of(task: ShardTask, store: Store) -> list[Sample]:
    """The task's samples with what the ledger knows of them. Raises `EncodeError` if it lacks one."""
    with store.open(task.source.only(".parquet")) as file:
        ledger = pq.read_table(file, columns=list(LEDGER_COLUMNS))
    places = pc.index_in(pa.array(task.keys, pa.string()), ledger.column("key").combine_chunks())
    rows = ledger.take(places).to_pylist()
    samples = []
    for uid, key, split, row in zip(task.uids, task.keys, task.splits, rows, strict=True):
        if row["uid"] != uid:
            raise EncodeError(
                f"the selection lists sample {uid} as {key!r} of shard {task.shard}, whose ledger has {row['uid']}"
                " there; select again with `--force select`"
            )
        size = {name: int(row[name] or 0) for name in ("original_width", "original_height")}
        samples.append(Sample(uid, key, split, row["caption"] or "", **size))
    return samples


def images_of(task: ShardTask, store: Store) -> Iterator[NDArray[np.uint8]]:
    """RGB [h, w, 3] of each sample of the task, read from the tar one after another.

    Raises `UnusableImage` if one is not in the tar or can't be decoded.
    """
    path = store.fetch(task.source.only(".tar"))
    with tarfile.open(path, "r:") as tar:
        members = {
            PurePosixPath(member.name).stem: member
            for member in tar
            if PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES
        }
        for key in task.keys:
            file = tar.extractfile(members[key]) if key in members else None
            if file is None:
                raise UnusableImage(f"{path} has no image {key!r}, which is listed; acquire it again")
            yield decoded(file.read(), f"image {key!r} of {path}")


def decoded(encoded: bytes, where: str) -> NDArray[np.uint8]:
    """RGB [h, w, 3]. Raises `UnusableImage`; `where` names the image."""
    import cv2

    pixels: Any = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB) if encoded else None
    if pixels is None:
        raise UnusableImage(f"{where} can't be decoded; the file was damaged, acquire it again")
    return np.asarray(pixels, np.uint8)
