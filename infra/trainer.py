"""Ray Train on a cluster of `infra.cluster`. Importing this module imports Ray Train."""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


class LocalTorchTrainer(TorchTrainer):  # type: ignore[misc]
    """Ray's `TorchTrainer` for a local cluster: without the actor that cleans up after a controller that died.

    That actor asks the server of Ray's dashboard each second whether the controller lives. A local cluster has no such
    server, so that it would log one warning a second, most of a run's log; and it has nothing to clean up, since all
    ends with the driver. (Ray 2.60; it can go when Ray can be told to leave the actor out.)
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        return [one for one in callbacks if not isinstance(one, PlacementGroupCleanerCallback)]
