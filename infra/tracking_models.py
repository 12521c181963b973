"""Models among MLflow's runs: each kept checkpoint is a logged model, and figures are linked to it and to their data.

MLflow keeps facts, not files: what it calls external models. Everything here may be repeated, and told late.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from infra.tracking_server import MAX_PARAM_LENGTH, MAX_TAG_LENGTH, Scalar, safe_name, shortened

LOCATION_TAG = "latentworks.location"
TRAINING_TAG = "latentworks.training"
MANIFEST_TAG = "latentworks.manifest_sha256"
TRAINED_TAG, TRAINED_LOCATION_TAG = "latentworks.trained_revision", "latentworks.trained_location"
CHECKPOINT_TYPE = "checkpoint"

Context = Literal["training", "evaluation"]


@dataclass(frozen=True)
class DatasetFacts:
    """Data that a model was made from, or measured against: its revision, and where its manifest lies."""

    name: str
    revision: str
    location: str


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint that is kept: its folder, the hash of its manifest, and how far the training was."""

    location: str
    manifest_sha256: str
    step: int
    images: int
    """Seen until then, each as often as it was."""


@dataclass(frozen=True)
class TrainingFacts:
    """All checkpoints that are kept of one training, the newest last.

    `name` is its node's ("train.base"), `training` tells it from others of that node. Once it is finished, `trained`
    is the revision of the model that came out, and `trained_location` where that lies.
    """

    name: str
    training: str
    checkpoints: tuple[CheckpointFacts, ...]
    trained: str | None = None
    trained_location: str | None = None
    datasets: tuple[DatasetFacts, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainingFacts:
        checkpoints = tuple(CheckpointFacts(**checkpoint) for checkpoint in value["checkpoints"])
        return cls(**{**value, "checkpoints": checkpoints, "datasets": datasets_from_json(value["datasets"])})


@dataclass(frozen=True)
class EvaluationFacts:
    """Figures of the model that `training` came to, against `datasets`, of which the first is what they are linked to.

    Without checkpoints of the training that are kept, they are figures of the run alone.
    """

    training: TrainingFacts
    figures: Mapping[str, float] = field(default_factory=dict)
    datasets: tuple[DatasetFacts, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EvaluationFacts:
        training = TrainingFacts.from_json(value["training"])
        return cls(training, value["figures"], datasets_from_json(value["datasets"]))


def datasets_from_json(values: Sequence[Mapping[str, Any]]) -> tuple[DatasetFacts, ...]:
    return tuple(DatasetFacts(**value) for value in values)


def keep_checkpoints(client: Any, experiment_id: str, run_id: str | None, facts: TrainingFacts) -> str | None:
    """Have the training's logged models be those of `facts`; the id of the newest one. None if there is none.

    A checkpoint that is kept no longer has none either. A newer one than all of `facts` stays while training goes on:
    they were told late. What a finished training kept is final. Raises MLflow's errors.
    """
    told = {checkpoint.manifest_sha256: checkpoint for checkpoint in facts.checkpoints}
    latest = max((checkpoint.step for checkpoint in facts.checkpoints), default=-1)
    wanted = f"tags.`{TRAINING_TAG}` = '{facts.training}'"
    known = {model.tags.get(MANIFEST_TAG): model for model in all_models(client, experiment_id, wanted)}
    newest_known = max((_step(model) for model in known.values()), default=-1)
    final = facts.trained is not None
    for manifest, model in known.items():
        if manifest not in told and (final or _step(model) <= latest):
            client.delete_logged_model(model.model_id)
    newest = None
    for manifest, checkpoint in told.items():
        model = known.get(manifest)
        if model is None and checkpoint.step < newest_known and not final:
            continue
        model = _checkpoint(client, experiment_id, run_id, facts, checkpoint, model)
        newest = model if checkpoint.step == latest else newest
    return None if newest is None else str(newest.model_id)


def all_models(client: Any, experiment_id: str, wanted: str) -> Iterator[Any]:
    """Page by page."""
    token = None
    while True:
        page = client.search_logged_models([experiment_id], wanted, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def link_figures(client: Any, experiment_id: str, run_id: str, facts: EvaluationFacts, time_ms: int) -> None:
    """Log the figures in the run, linked to the newest checkpoint of the training and to the data. Raises MLflow's
    errors."""
    model_id = keep_checkpoints(client, experiment_id, None, facts.training)
    entities = importlib.import_module("mlflow.entities")
    models = [] if model_id is None else [entities.LoggedModelInput(model_id)]
    inputs = dataset_inputs(facts.datasets, "evaluation")
    if models or inputs:
        client.log_inputs(run_id, datasets=inputs, models=models)
    log_figures(client, run_id, model_id, facts.figures, facts.datasets, time_ms)


def log_figures(
    client: Any,
    run_id: str,
    model_id: str | None,
    figures: Mapping[str, float],
    datasets: Sequence[DatasetFacts],
    time_ms: int,
) -> None:
    """Metrics of the run, of the model, and of the first of `datasets`."""
    metric = importlib.import_module("mlflow.entities").Metric
    data: dict[str, str | None] = {"dataset_name": None, "dataset_digest": None}
    if datasets:
        data = {"dataset_name": safe_name(datasets[0].name), "dataset_digest": datasets[0].revision}
    values = [
        metric(safe_name(name), float(value), time_ms, 0, model_id=model_id, **data) for name, value in figures.items()
    ]
    if values:
        client.log_batch(run_id, metrics=values)


def dataset_inputs(datasets: Sequence[DatasetFacts], context: Context) -> list[Any]:
    entities = importlib.import_module("mlflow.entities")
    return [
        entities.DatasetInput(
            entities.Dataset(safe_name(data.name), data.revision, "local", json.dumps({"uri": data.location})),
            [entities.InputTag("mlflow.data.context", context)],
        )
        for data in datasets
    ]


def external_model(
    client: Any,
    experiment_id: str,
    run_id: str | None,
    name: str,
    tags: Mapping[str, str],
    params: Mapping[str, Scalar],
    model_type: str,
) -> Any:
    """A logged model whose files are elsewhere. It is not finished yet: see `finished_model`."""
    fitting = {safe_name(key): shortened(str(value), MAX_PARAM_LENGTH) for key, value in params.items()}
    own = fit_tags(tags) | {"mlflow.model.isExternal": "true"}
    name = safe_name(name).translate(str.maketrans("/:.", "___"))  # a logged model's takes none of these
    return client.create_logged_model(experiment_id, name, run_id, own, fitting, model_type)


def finished_model(client: Any, run_id: str | None, model: Any, step: int = 0) -> Any:
    """The same, usable, and an output of the run; nothing is done to one that is."""
    if str(model.status) == "READY":
        return model
    specification = importlib.import_module("mlflow.models.utils").get_external_mlflow_model_spec(model)
    with tempfile.TemporaryDirectory() as folder:
        specification.save(str(Path(folder) / "MLmodel"))
        client.log_model_artifacts(model.model_id, folder)
    model = client.finalize_logged_model(model.model_id, "READY")
    if run_id is not None:
        output = importlib.import_module("mlflow.entities").LoggedModelOutput(model.model_id, step)
        client.log_outputs(run_id, [output])
    return model


def fit_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {safe_name(key): shortened(value, MAX_TAG_LENGTH) for key, value in tags.items()}


def data_tags(datasets: Sequence[DatasetFacts]) -> dict[str, str]:
    return {f"latentworks.data.{data.name}": data.revision for data in datasets}


def _checkpoint(
    client: Any, experiment_id: str, run_id: str | None, facts: TrainingFacts, checkpoint: CheckpointFacts, known: Any
) -> Any:
    tags = {LOCATION_TAG: checkpoint.location, MANIFEST_TAG: checkpoint.manifest_sha256, TRAINING_TAG: facts.training}
    if facts.trained is not None:
        tags |= {TRAINED_TAG: facts.trained, TRAINED_LOCATION_TAG: facts.trained_location or ""}
    tags |= data_tags(facts.datasets)
    if known is None:
        name = f"{facts.name}-step-{checkpoint.step:06d}"
        params = {"step": checkpoint.step, "images": checkpoint.images}
        known = external_model(client, experiment_id, run_id, name, tags, params, CHECKPOINT_TYPE)
    elif not fit_tags(tags).items() <= known.tags.items():
        client.set_logged_model_tags(known.model_id, fit_tags(tags))
    return finished_model(client, run_id, known, checkpoint.step)


def _step(model: Any) -> int:
    return int(model.params.get("step", -1))
