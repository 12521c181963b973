"""When ranks save and resume together: each writes its shard, rank 0 completes the checkpoint; all resume from one.

The shards' content is `infra.engine`'s matter, the checkpoint's format `infra.checkpoints`', and from which one a
training begins `continuation`'s.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from infra.checkpoints import (
    CheckpointRef,
    FileDigest,
    fetch_checkpoint,
    prune_checkpoints,
    publish_manifest,
    upload_files,
)
from infra.engine import Engine
from infra.ranks import objects_group
from infra.storage import Store


@dataclass(frozen=True)
class Position:
    """How far training is: `step` global batches, in `elapsed_s` seconds. With the seed, all that the loader needs."""

    step: int = 0
    elapsed_s: float = 0.0
    continued_from: int | None = None
    """The step at which a finished, shorter training was gone on from."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training. Every rank makes the same calls at the same steps."""

    store: Store
    prefix: str
    keep: int

    def save(self, engine: Engine, position: Position) -> None:
        """Publish a checkpoint, then delete all but the newest `keep`. Raises `StorageError`."""
        with tempfile.TemporaryDirectory(prefix="ldm-checkpoint-") as folder:
            names = engine.save(Path(folder), asdict(position))
            mine = upload_files(self.store, self.prefix, Path(folder), position.step, names)
        everyones: list[list[FileDigest]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyones, mine, group=objects_group())
        if dist.get_rank() == 0:
            files = [file for one in everyones for file in one]
            publish_manifest(self.store, self.prefix, position.step, files, asdict(position))
            prune_checkpoints(self.store, self.prefix, self.keep)
        dist.barrier(group=objects_group())  # not in the next step, where an accelerator's collectives time out

    def load(self, engine: Engine, ref: CheckpointRef) -> Position:
        """Take over what `ref` holds into `engine`. Raises `infra.checkpoints.CheckpointCorrupt`, `StorageError`."""
        return Position(**engine.load(fetch_checkpoint(self.store, ref)))
