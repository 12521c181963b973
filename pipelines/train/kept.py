"""The checkpoints that are kept of a training, as tracking is told of them."""

from __future__ import annotations

import logging

from infra.checkpoints import complete_checkpoints, manifest_sha256
from infra.storage import StorageError, Store
from infra.tracking_models import CheckpointFacts, TrainingFacts
from pipelines.train.job import checkpoints_of

logger = logging.getLogger(__name__)


def kept_checkpoints(store: Store, node: str, unit_key: str, global_batch_size: int) -> TrainingFacts | None:
    """Those of the training that makes, or has made, the unit `unit_key` of `node`; None if the store doesn't tell."""
    try:
        found = tuple(
            CheckpointFacts(
                store.location(ref.path), manifest_sha256(store, ref), ref.step, ref.step * global_batch_size
            )
            for ref in reversed(complete_checkpoints(store, checkpoints_of(node, unit_key)))
        )
    except (StorageError, FileNotFoundError) as error:
        logger.warning("%s: tracking is not told which checkpoints are kept: %s", node, error)
        return None
    return TrainingFacts(node, f"{node}/{unit_key}", found)
