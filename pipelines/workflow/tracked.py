"""What MLflow is told of nodes beside what their stages report: figures, the model that they are of, and the data.

The run of the workflow has the figures of all its nodes, those that were up to date too: so runs sort by them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from infra.tracking import RunHandle
from infra.tracking_models import DatasetFacts, EvaluationFacts, TrainingFacts
from pipelines.artifacts import Artifact
from pipelines.dataset.acquired import is_acquired
from pipelines.dataset.errors import DatasetError
from pipelines.dataset.figures import Figure, figures_of, metrics_of
from pipelines.train.kept import kept_checkpoints
from pipelines.workflow.node import Node

SELECT = "select"

logger = logging.getLogger(__name__)


def tell_made(handle: RunHandle, node: Node, nodes: Mapping[str, Node], artifacts: Mapping[str, Artifact]) -> None:
    """Tell the run of a node that was made which checkpoints of a training are kept, or of which model an evaluation's
    figures are. `artifacts` are those of the node and of all that it is made from, by node."""
    if node.stage == "train":
        training = training_of(node.name, nodes, artifacts)
        if training is not None:
            handle.checkpoints(training)
    if node.stage == "evaluate":
        figures = metrics_of(_figures(artifacts[node.name]))
        training = training_of(f"train.{node.name.partition('.')[2]}", nodes, artifacts)
        if figures and training is None:
            handle.metrics(figures)
        elif figures and training is not None:
            handle.evaluation(EvaluationFacts(training, figures, data_of(node.name, nodes, artifacts)))


def tell_figures(parent: RunHandle, node: str, artifact: Artifact) -> None:
    """Tell the workflow's run the figures that a node has now: "<node>/<figure>"."""
    found = metrics_of(_figures(artifact))
    if found:
        parent.metrics({f"{node}/{name}": value for name, value in found.items()})


def training_of(node: str, nodes: Mapping[str, Node], artifacts: Mapping[str, Artifact]) -> TrainingFacts | None:
    """What is known of the finished training of a node; None if its store doesn't tell."""
    artifact = artifacts[node]
    (unit,) = artifact.units
    store = artifact.store
    batch_size = int(artifact.settings["train"]["global_batch_size"])
    kept = kept_checkpoints(store, node, unit.key, batch_size)
    if kept is None:
        return None
    return replace(
        kept,
        trained=artifact.revision,
        trained_location=store.location(f"{node}/units/{unit.key}"),
        datasets=data_of(node, nodes, artifacts),
    )


def data_of(node: str, nodes: Mapping[str, Node], artifacts: Mapping[str, Artifact]) -> tuple[DatasetFacts, ...]:
    """The selection and the acquired pairs that a node is made from, directly or not; the selection first."""
    upstream: dict[str, None] = {}
    pending = [node]
    while pending:
        inputs = nodes[pending.pop()].inputs
        pending += [name for name in inputs if name not in upstream]
        upstream |= dict.fromkeys(inputs)
    names = [name for name in nodes if name in upstream and (name == SELECT or is_acquired(name))]
    return tuple(
        DatasetFacts(name, artifacts[name].revision, artifacts[name].store.location(artifacts[name].path))
        for name in sorted(names, key=lambda name: name != SELECT)
    )


def _figures(artifact: Artifact) -> list[Figure]:
    try:
        return figures_of(artifact)
    except DatasetError as error:
        logger.warning("MLflow is not told the figures of %s: %s", artifact.stage, error)
        return []
