"""The selected samples of one shard: which they are, and their images out of its tar, in the order of their keys."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from infra.storage import Store
from pipelines.artifacts import Artifact, Unit, digest
from pipelines.dataset.acquired import Shards
from pipelines.dataset.errors import DatasetError
from pipelines.dataset.ledgers import TAR, read_ledger, shard_of
from pipelines.dataset.selection import read_selection, rows_by_shard

LEDGER_COLUMNS = ("key", "uid", "caption", "original_width", "original_height", "stored_sha256")


@dataclass(frozen=True)
class ShardSamples:
    """The selected samples of the acquired shard `source`, in the order of their keys."""

    source: Unit
    uids: Sequence[str]
    keys: Sequence[str]
    splits: Sequence[str]

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def shard(self) -> str:
        return shard_of(self.source)

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
    stored_sha256: str | None = None
    """Hash of the image's file in the shard, if the ledger has it."""


def selected_samples(acquired: Shards, selected: Artifact, store: Store) -> list[ShardSamples]:
    """The selected samples of each acquired shard, in their order; without samples where nothing of it was selected.

    Raises `DatasetError` if the selection lists a shard that isn't there.
    """
    rows = read_selection(selected, store, ["shard", "key", "uid", "split"])
    by_shard = rows_by_shard(rows.sort_by([("shard", "ascending"), ("key", "ascending")]))
    found = []
    for unit in acquired.units:
        own = by_shard.pop(shard_of(unit), rows.slice(0, 0))
        uids, keys, splits = (own.column(name).to_pylist() for name in ("uid", "key", "split"))
        found.append(ShardSamples(unit, uids, keys, splits))
    if by_shard:
        raise DatasetError(f"the selection lists shards {sorted(by_shard)[:5]}, which `acquire` did not publish")
    return found


def with_ledger(selected: ShardSamples, store: Store) -> list[Sample]:
    """The samples with what the ledger knows of them. Raises `DatasetError` if it lacks one."""
    rows = read_ledger(selected.source, store, LEDGER_COLUMNS, selected.keys).to_pylist()
    samples = []
    for uid, key, split, row in zip(selected.uids, selected.keys, selected.splits, rows, strict=True):
        if row["uid"] != uid:
            raise DatasetError(
                f"the selection lists sample {uid} as {key!r} of shard {selected.shard}, whose ledger has {row['uid']}"
                " there; select again with `--force select`"
            )
        size = {name: int(row[name] or 0) for name in ("original_width", "original_height")}
        stored_sha256 = row.get("stored_sha256")
        samples.append(Sample(uid, key, split, row["caption"] or "", **size, stored_sha256=stored_sha256))
    return samples


def sample_id(uid: str) -> int:
    """64 bits of the sample's uid, any string."""
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "little")
