"""Released models in a real MLflow on SQLite: versions, aliases, lineage, and where the files lie."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from typing import Any

import pytest

from infra.registry import CANDIDATE, CHAMPION, ModelFacts, RegistryError, location_of
from infra.tracking import Tracker, TrackingSpec
from infra.tracking_models import DatasetFacts

# MLflow 3.17 maps its tables in a way that SQLAlchemy 2.1 gives up.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

KID = "kid_efficientnet_lite0_128px"
FACTS = ModelFacts(
    revision="a" * 32,
    location="/store/release/units/1",
    model_hash="f" * 64,
    datasets=(DatasetFacts("select", "b" * 32, "/store/select/revisions/b"),),
    params={"recipe_digest": "c" * 32, "base.steps": 24},
    metrics={KID: 0.05, "fd_closed": 0.6},
    decided_by=KID,
)


def release(spec: TrackingSpec, *models: ModelFacts) -> str:
    """A run that reports these models; its id."""
    workflow = Tracker(spec).start_run("workflow")
    node = workflow.child("release")
    for facts in models:
        node.model(facts)
    node.finish()
    assert workflow.finish(timeout_s=60)
    assert node.run_id is not None
    return node.run_id


def aliases(client: Any, spec: TrackingSpec) -> dict[str, int]:
    found = client.get_registered_model(spec.experiment).aliases
    return {alias: int(version) for alias, version in found.items()}


def test_a_model_arrives_with_its_lineage(spec: TrackingSpec, client: Any) -> None:
    run_id = release(spec, FACTS)
    version = client.get_model_version_by_alias(spec.experiment, CHAMPION)
    assert version.run_id == run_id
    assert version.tags["latentworks.revision"] == FACTS.revision
    assert version.tags["latentworks.model_hash"] == FACTS.model_hash
    assert location_of(spec.resolved_uri, spec.experiment, CANDIDATE) == FACTS.location

    model = client.get_logged_model(version.tags["latentworks.model_id"])
    assert str(model.status) == "READY"
    assert model.source_run_id == run_id
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": spec.experiment, "version": 1}]
    assert model.params == {"recipe_digest": "c" * 32, "base.steps": "24"}
    assert {metric.key: metric.value for metric in model.metrics} == {KID: 0.05, "fd_closed": 0.6}
    assert {metric.dataset_digest for metric in model.metrics} == {"b" * 32}

    run = client.get_run(run_id)
    assert [(data.dataset.name, data.dataset.digest) for data in run.inputs.dataset_inputs] == [("select", "b" * 32)]
    assert [output.model_id for output in run.outputs.model_outputs] == [model.model_id]


def test_the_champion_gives_way_to_one_that_is_not_worse(
    spec: TrackingSpec, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def with_kid(letter: str, **metrics: float) -> ModelFacts:
        return replace(FACTS, revision=letter * 32, metrics=metrics, decided_by=KID if KID in metrics else None)

    expected = [
        (with_kid("1"), {CANDIDATE: 1, CHAMPION: 1}),  # the first, even without figures
        (with_kid("2", **{KID: 0.05}), {CANDIDATE: 2, CHAMPION: 1}),  # nothing to compare with
    ]
    for facts, wanted in expected:
        release(spec, facts)
        assert aliases(client, spec) == wanted
    assert f"version 1 of {spec.experiment} stays the champion: nothing is known of its {KID}" in caplog.text
    client.set_registered_model_alias(spec.experiment, CHAMPION, "2")  # a person's decision
    for letter, kid, champion in (("3", 0.06, 2), ("4", 0.05, 4), ("5", 0.01, 5)):
        release(spec, with_kid(letter, **{KID: kid}))
        assert aliases(client, spec) == {CANDIDATE: int(letter), CHAMPION: champion}


def test_the_same_revision_is_one_version_and_follows_its_files(spec: TrackingSpec, client: Any) -> None:
    release(spec, FACTS, replace(FACTS, location="/store/release/units/2"))
    release(spec, FACTS)
    assert len(client.search_model_versions(f"name = '{spec.experiment}'")) == 1
    assert location_of(spec.resolved_uri, spec.experiment, CHAMPION) == FACTS.location


def test_sending_twice_makes_one_model(spec: TrackingSpec, client: Any) -> None:
    """As after a crash between MLflow's answer and the note of it."""
    tracker = Tracker(spec)
    run = tracker.start_run("run")
    run.model(FACTS)
    run.metrics({"after": 1.0})
    assert tracker.flush(60)
    journal = next((spec.state_dir / "spool").glob("*.jsonl"))
    shutil.copy(journal, journal.with_name("copy.jsonl"))  # without its progress
    assert run.finish()
    time.sleep(0.01)
    release(spec)
    assert not (spec.state_dir / "spool" / "copy.jsonl").exists()
    assert len(client.search_model_versions(f"name = '{spec.experiment}'")) == 1
    models = client.search_logged_models([client.get_experiment_by_name(spec.experiment).experiment_id])
    assert len(models) == 1
    assert len(client.get_run(run.run_id).inputs.dataset_inputs) == 1
    assert len(models[0].metrics) == 2


def test_an_unknown_alias_is_named(spec: TrackingSpec) -> None:
    with pytest.raises(RegistryError, match="no model 'nothing' with alias 'champion'"):
        location_of(spec.resolved_uri, "nothing", CHAMPION)
