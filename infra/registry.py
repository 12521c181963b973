"""MLflow's model registry: which models there are, which one is the champion, and where the files of each lie.

MLflow keeps facts, not files: a model's weights stay in the store, at the location that its version names.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from infra.tracking_models import (
    LOCATION_TAG,
    DatasetFacts,
    data_tags,
    dataset_inputs,
    datasets_from_json,
    external_model,
    finished_model,
    fit_tags,
    log_figures,
)
from infra.tracking_server import MIGRATIONS, Scalar, reason, safe_name, set_mlflow_environment, without_password

CHAMPION, CANDIDATE = "champion", "candidate"
REVISION_TAG = "latentworks.revision"
MODEL_TAG = "latentworks.model_id"
HASH_TAG = "latentworks.model_hash"
MODEL_TYPE = "text-to-image latent diffusion"

logger = logging.getLogger(__name__)


class RegistryError(Exception):
    """A model can't be looked up; the message says what was asked, where, and what there is."""


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
        return cls(**{**value, "datasets": datasets_from_json(value["datasets"])})


def register(client: Any, experiment_id: str, run_id: str, name: str, facts: ModelFacts, time_ms: int) -> str:
    """The version of `facts.revision` under `name`, made unless it is there, now the candidate. Repeating is harmless.

    It becomes the champion if there is none, or if its deciding metric is not worse than the champion's. Without
    figures that can be compared, the champion stays: a person moves the alias.

    Raises MLflow's errors.
    """
    if facts.datasets:
        client.log_inputs(run_id, datasets=dataset_inputs(facts.datasets, "training"))
    model = _logged_model(client, experiment_id, run_id, name, facts)
    log_figures(client, run_id, model.model_id, facts.metrics, facts.datasets, time_ms)
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
    """Parameters, metrics and lineage."""
    found = client.search_logged_models([experiment_id], f"tags.`{REVISION_TAG}` = '{facts.revision}'", max_results=1)
    model = (
        found[0]
        if found
        else external_model(client, experiment_id, run_id, name, _tags(facts), facts.params, MODEL_TYPE)
    )
    return finished_model(client, run_id, model)


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
    tags |= data_tags(facts.datasets)
    if facts.decided_by and facts.decided_by in facts.metrics:
        tags[facts.decided_by] = repr(float(facts.metrics[facts.decided_by]))
    return fit_tags(tags)


def _wins(client: Any, name: str, version: Any, facts: ModelFacts) -> bool:
    champion = client.get_registered_model(name).aliases.get(CHAMPION)
    if champion is None or str(champion) == str(version.version):
        return True
    if facts.decided_by is None or facts.decided_by not in facts.metrics:
        return False
    theirs = client.get_model_version(name, champion).tags.get(safe_name(facts.decided_by))
    if theirs is None:
        logger.warning(
            "version %s of %s stays the champion: nothing is known of its %s, by which the new version %s would be"
            " compared with it; move the alias in MLflow if it is better",
            *(champion, name, facts.decided_by, version.version),
        )
        return False
    return facts.metrics[facts.decided_by] <= float(theirs)
