"""When ranks save and resume together: each writes its shard, rank 0 completes the checkpoint; all resume from one.

The shards' content is `infra.engine`'s matter, the checkpoint's format `infra.checkpoints`'.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from infra.checkpoints import (
    CheckpointCorrupt,
    CheckpointRef,
    FileDigest,
    complete_checkpoints,
    fetch_checkpoint,
    prune_checkpoints,
    publish_manifest,
    upload_files,
)
from infra.engine import Engine
from infra.storage import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """How far training is: `step` global batches, in `elapsed_s` seconds. With the seed, all that the loader needs."""

    step: int = 0
    elapsed_s: float = 0.0


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
        dist.all_gather_object(everyones, mine)
        if dist.get_rank() == 0:
            files = [file for one in everyones for file in one]
            publish_manifest(self.store, self.prefix, position.step, files, asdict(position))
            prune_checkpoints(self.store, self.prefix, self.keep)

    def resume(self, engine: Engine) -> Position:
        """Load the newest sound checkpoint into `engine`; the position is that of the start if there is none."""
        chosen: list[CheckpointRef | None] = [self._newest_sound() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(chosen)
        if chosen[0] is None:
            return Position()
        return Position(**engine.load(fetch_checkpoint(self.store, chosen[0])))

    def _newest_sound(self) -> CheckpointRef | None:
        for ref in complete_checkpoints(self.store, self.prefix):
            try:
                fetch_checkpoint(self.store, ref)
            except CheckpointCorrupt as error:
                logger.warning("not resuming from step %d: %s", ref.step, error)
            else:
                return ref
        return None
