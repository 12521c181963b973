"""MLflow's model registry: which models there are, which one is the champion, and where the files of each lie.

MLflow keeps facts, not files: a model's weights stay in the store, at the location that its version names.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.tracking_server import (
    MAX_PARAM_LENGTH,
    MAX_TAG_LENGTH,
    MIGRATIONS,
    Scalar,
    reason,
    safe_name,
    set_mlflow_environment,
    shortened,
    without_password,
)

CHAMPION, CANDIDATE = "champion", "candidate"
REVISION_TAG = "latentworks.revision"
LOCATION_TAG = "latentworks.location"
MODEL_TAG = "latentworks.model_id"
HASH_TAG = "latentworks.model_hash"
MODEL_TYPE = "text-to-image latent diffusion"


class RegistryError(Exception):
    """A model can't be looked up; the message says what was asked, where, and what there is."""


@dataclass(frozen=True)
class DatasetFacts:
    """Data that a model was made from: its revision, and where its manifest lies."""

    name: str
    revision: str
    location: str


@dataclass(frozen=True)
class ModelFacts:
    """A released model as the registry knows it.

    `revision` names its content: the same one is registered once. `location` is the folder in the store, `model_hash`
    is of its weights. `decided_by` names the metric, lower is better, by which models of one name are compared.
    """

    revision: str
    location: str
    model_hash: str
    datasets: tuple[DatasetFacts, ...] = ()
    params: Mapping[str, Scalar] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    decided_by: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ModelFacts:
        datasets = tuple(DatasetFacts(**dataset) for dataset in value["datasets"])
        return cls(**{**value, "datasets": datasets})


def register(client: Any, experiment_id: str, run_id: str, name: str, facts: ModelFacts, time_ms: int) -> str:
    """The version of `facts.revision` under `name`, made unless it is there, now the candidate. Repeating is harmless.

    It becomes the champion if there is none, or if its deciding metric is not worse than the champion's. Without
    figures that can be compared, the champion stays: a person moves the alias.

    Raises MLflow's errors.
    """
    entities = importlib.import_module("mlflow.entities")
    datasets = [
        entities.DatasetInput(
            entities.Dataset(safe_name(data.name), data.revision, "local", _source(data.location)),
            [entities.InputTag("mlflow.data.context", "training")],
        )
        for data in facts.datasets
    ]
    if datasets:
        client.log_inputs(run_id, datasets=datasets)
    model = _logged_model(client, experiment_id, run_id, name, facts)
    _log_metrics(client, run_id, model.model_id, facts, time_ms)
    version = _version(client, run_id, name, model, facts)
    # A server notes this by itself, a client of a database doesn't.
    shown = json.dumps([{"name": name, "version": int(version.version)}])
    client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": shown})
    client.set_registered_model_alias(name, CANDIDATE, version.version)
    if _wins(client, name, version, facts):
        client.set_registered_model_alias(name, CHAMPION, version.version)
    return str(version.version)


def location_of(uri: str, name: str, alias: str) -> str:
    """Where the files of `models:/name@alias` lie, as the MLflow at `uri` knows.

    Raises `RegistryError` if there is no such model, or no answer.
    """
    set_mlflow_environment()
    mlflow = importlib.import_module("mlflow")
    known = importlib.import_module("mlflow.exceptions").MlflowException
    database_error = importlib.import_module("sqlalchemy.exc").SQLAlchemyError
    where = without_password(uri)
    try:
        with MIGRATIONS:
            version = mlflow.MlflowClient(uri).get_model_version_by_alias(name, alias)
    except (known, database_error, OSError) as error:
        raise RegistryError(
            f"MLflow at {where} has no model {name!r} with alias {alias!r} ({reason(error)}); `release` makes one, and"
            " MLFLOW_TRACKING_URI names another server"
        ) from error
    location = version.tags.get(LOCATION_TAG)
    if location is None:
        raise RegistryError(f"version {version.version} of {name!r} in MLflow at {where} was not made by `release`")
    return str(location)


def _logged_model(client: Any, experiment_id: str, run_id: str, name: str, facts: ModelFacts) -> Any:
    """What MLflow calls an external model: parameters, metrics and lineage here, the files elsewhere."""
    found = client.search_logged_models([experiment_id], f"tags.`{REVISION_TAG}` = '{facts.revision}'", max_results=1)
    if found:
        model = found[0]
    else:
        params = {safe_name(key): shortened(str(value), MAX_PARAM_LENGTH) for key, value in facts.params.items()}
        tags = _tags(facts) | {"mlflow.model.isExternal": "true"}
        model = client.create_logged_model(experiment_id, _model_name(name), run_id, tags, params, MODEL_TYPE)
    if str(model.status) != "READY":
        specification = importlib.import_module("mlflow.models.utils").get_external_mlflow_model_spec(model)
        with tempfile.TemporaryDirectory() as folder:
            specification.save(str(Path(folder) / "MLmodel"))
            client.log_model_artifacts(model.model_id, folder)
        model = client.finalize_logged_model(model.model_id, "READY")
        output = importlib.import_module("mlflow.entities").LoggedModelOutput(model.model_id, 0)
        client.log_outputs(run_id, [output])
    return model


def _log_metrics(client: Any, run_id: str, model_id: str, facts: ModelFacts, time_ms: int) -> None:
    metric = importlib.import_module("mlflow.entities").Metric
    data: dict[str, str | None] = {"dataset_name": None, "dataset_digest": None}
    if facts.datasets:
        data = {"dataset_name": safe_name(facts.datasets[0].name), "dataset_digest": facts.datasets[0].revision}
    values = [
        metric(safe_name(name), float(value), time_ms, 0, model_id=model_id, **data)
        for name, value in facts.metrics.items()
    ]
    if values:
        client.log_batch(run_id, metrics=values)


def _version(client: Any, run_id: str, name: str, model: Any, facts: ModelFacts) -> Any:
    if not client.search_registered_models(f"name = '{name}'", max_results=1):
        client.create_registered_model(name, description="Released by Latentworks; files stay in the store.")
    wanted = f"name = '{name}' and tags.`{REVISION_TAG}` = '{facts.revision}'"
    found = client.search_model_versions(wanted, max_results=1)
    if found:
        if found[0].tags.get(LOCATION_TAG) != facts.location:  # released anew, with the same content
            client.set_model_version_tag(name, found[0].version, LOCATION_TAG, facts.location)
        return found[0]
    return client.create_model_version(
        name,
        source=model.artifact_location,
        run_id=run_id,
        tags=_tags(facts) | {MODEL_TAG: model.model_id},
        description=f"Files: {facts.location}",
        await_creation_for=0,
        model_id=model.model_id,
    )


def _tags(facts: ModelFacts) -> dict[str, str]:
    tags = {REVISION_TAG: facts.revision, LOCATION_TAG: facts.location, HASH_TAG: facts.model_hash}
    tags |= {f"latentworks.data.{data.name}": data.revision for data in facts.datasets}
    if facts.decided_by and facts.decided_by in facts.metrics:
        tags[facts.decided_by] = repr(float(facts.metrics[facts.decided_by]))
    return {safe_name(key): shortened(value, MAX_TAG_LENGTH) for key, value in tags.items()}


def _wins(client: Any, name: str, version: Any, facts: ModelFacts) -> bool:
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if champion is None or str(champion) == str(version.version):
        return True
    if facts.decided_by is None or facts.decided_by not in facts.metrics:
        return False
    theirs = client.get_model_version(name, champion).tags.get(safe_name(facts.decided_by))
    return theirs is not None and facts.metrics[facts.decided_by] <= float(theirs)


def _model_name(name: str) -> str:
    """A logged model's name takes no dots or slashes."""
    return safe_name(name).translate(str.maketrans("/:.", "___"))


def _source(location: str) -> str:
    return json.dumps({"uri": location})
