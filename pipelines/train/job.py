"""What is sent to a training process: which model, from what, where to, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.recipe import Execution, Model
from pipelines.recipe.plugins import Plugin


def work_of(node: str, unit_key: str) -> str:
    """See `TrainJob.work`."""
    return f"{node}/unfinished/{unit_key}"


def checkpoints_of(node: str, unit_key: str) -> str:
    """Folder in the store of the checkpoints of the training that makes a unit."""
    return f"{work_of(node, unit_key)}/checkpoints"


@dataclass(frozen=True)
class TrainJob:
    """One model to train. `unit_key` names the unit that rank 0 publishes at the end."""

    name: str
    model: Model
    inputs: Mapping[str, Artifact]
    store: Store
    execution: Execution
    unit_key: str
    lineage: str
    """Trainings that are alike but for their length: see `continuation`."""
    from_nothing: bool = False
    """A finished training is not gone on from."""
    plugins: tuple[Plugin, ...] = ()
    """Plugins that registered names which previews are made or measured with."""

    @property
    def node(self) -> str:
        return f"train.{self.name}"

    @property
    def work(self) -> str:
        """Folder in the store of what is only needed until the unit is published, but for the last checkpoint."""
        return work_of(self.node, self.unit_key)

    @property
    def checkpoints(self) -> str:
        return checkpoints_of(self.node, self.unit_key)

    @property
    def launcher(self) -> str:
        """Folder in the store for what Ray Train wants to keep there."""
        return f"{self.work}/ray"
