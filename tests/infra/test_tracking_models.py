"""Kept checkpoints, figures and data in a real MLflow on SQLite: what belongs together is found from MLflow alone."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.tracking import RunHandle, Tracker, TrackingSpec
from infra.tracking_models import CheckpointFacts, DatasetFacts, EvaluationFacts, TrainingFacts, all_models

# MLflow 3.17 maps its tables in a way that SQLAlchemy 2.1 gives up.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

SELECT = DatasetFacts("select", "b" * 32, "/store/select/revisions/b")
FD, CLIP = "frechet_distance/seen/net", "clip_score/seen/judge"


def checkpoint(step: int, manifest: str = "") -> CheckpointFacts:
    return CheckpointFacts(f"/store/train.base/checkpoints/{step:09d}", manifest or f"{step:064d}", step, 32 * step)


def training(*steps: int, **more: Any) -> TrainingFacts:
    return TrainingFacts("train.base", "train.base/0", tuple(checkpoint(step) for step in steps), **more)


FINISHED = training(300, trained="c" * 32, trained_location="/store/train.base/units/0", datasets=(SELECT,))
EVALUATION = EvaluationFacts(FINISHED, {FD: 169.25, CLIP: 27.5, f"{FD}/floor": 31.0}, (SELECT,))


def tell(spec: TrackingSpec, report: Callable[[RunHandle], None], name: str = "train.base") -> str:
    """The id of a run that reports so."""
    workflow = Tracker(spec).start_run("workflow")
    node = workflow.child(name)
    report(node)
    node.finish()
    assert workflow.finish(timeout_s=60)
    assert node.run_id is not None
    return node.run_id


def models(client: Any, spec: TrackingSpec) -> dict[int, Any]:
    """The checkpoints that MLflow knows, by step."""
    experiment = client.get_experiment_by_name(spec.experiment)
    found = client.search_logged_models([experiment.experiment_id])
    assert len({model.params["step"] for model in found}) == len(found)
    return {int(model.params["step"]): model for model in found}


def test_from_a_checkpoint_to_its_figures_and_their_data(spec: TrackingSpec, client: Any) -> None:
    train_id = tell(spec, lambda run: run.checkpoints(FINISHED))
    evaluate_id = tell(spec, lambda run: run.evaluation(EVALUATION), "evaluate.base")

    experiment = client.get_experiment_by_name(spec.experiment).experiment_id
    tag = f"tags.`latentworks.manifest_sha256` = '{300:064d}'"
    (model,) = client.search_logged_models([experiment], tag)
    assert str(model.status) == "READY"
    assert model.source_run_id == train_id
    assert model.params == {"step": "300", "images": "9600"}
    assert model.tags["latentworks.location"] == FINISHED.checkpoints[0].location
    assert model.tags["latentworks.trained_revision"] == "c" * 32
    assert model.tags["latentworks.data.select"] == SELECT.revision
    (output,) = client.get_run(train_id).outputs.model_outputs
    assert (output.model_id, output.step) == (model.model_id, 300)

    assert {metric.key: metric.value for metric in model.metrics} == EVALUATION.figures
    assert {metric.run_id for metric in model.metrics} == {evaluate_id}
    linked = {(metric.dataset_name, metric.dataset_digest) for metric in model.metrics}
    assert linked == {("select", SELECT.revision)}

    run = client.get_run(evaluate_id)
    assert run.data.metrics == EVALUATION.figures
    assert [read.model_id for read in run.inputs.model_inputs] == [model.model_id]
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("select", SELECT.revision)
    assert SELECT.location in data.dataset.source
    assert {tag.key: tag.value for tag in data.tags} == {"mlflow.data.context": "evaluation"}
    best = [{"field_name": f"metrics.{FD}", "ascending": True}]
    assert [found.model_id for found in client.search_logged_models([experiment], order_by=best)] == [model.model_id]


def test_the_logged_models_are_those_that_are_kept(spec: TrackingSpec, client: Any) -> None:
    def progress(run: RunHandle) -> None:
        for kept in (training(100), training(100, 200), training(200, 300)):
            run.checkpoints(kept)

    tell(spec, progress)
    known = models(client, spec)
    assert set(known) == {200, 300}
    other = replace(training(100), training="train.base/1")
    tell(spec, lambda run: run.checkpoints(other))
    assert set(models(client, spec)) == {100, 200, 300}  # another training's is its own
    tell(spec, lambda run: run.checkpoints(FINISHED))
    now = models(client, spec)
    assert set(now) == {100, 300}
    assert now[300].model_id == known[300].model_id
    assert now[300].tags["latentworks.trained_location"] == FINISHED.trained_location


def test_what_a_finished_training_kept_is_final(spec: TrackingSpec, client: Any) -> None:
    """The newest checkpoint was damaged, and a training that goes on from the one before ends earlier."""
    tell(spec, lambda run: run.checkpoints(training(200, 400)))
    tell(spec, lambda run: run.evaluation(EVALUATION), "evaluate.base")
    found = models(client, spec)
    assert set(found) == {300}
    assert {metric.key for metric in found[300].metrics} == set(EVALUATION.figures)


def test_logged_models_are_looked_for_on_all_pages(spec: TrackingSpec, client: Any) -> None:
    class Narrow:
        def search_logged_models(self, *given: Any, **named: Any) -> Any:
            return client.search_logged_models(*given, **named, max_results=2)

    tell(spec, lambda run: run.checkpoints(training(100, 200, 300, 400, 500)))
    experiment = client.get_experiment_by_name(spec.experiment).experiment_id
    wanted = "tags.`latentworks.training` = 'train.base/0'"
    assert len({model.model_id for model in all_models(Narrow(), experiment, wanted)}) == 5


def test_a_step_that_was_made_anew_is_another_checkpoint(spec: TrackingSpec, client: Any) -> None:
    anew = replace(training(), checkpoints=(checkpoint(200, "f" * 64),))
    tell(spec, lambda run: (run.checkpoints(training(100, 200)), run.checkpoints(anew))[0])
    (model,) = models(client, spec).values()
    assert model.tags["latentworks.manifest_sha256"] == "f" * 64


def test_what_is_told_late_takes_nothing_back(spec: TrackingSpec, client: Any) -> None:
    """A journal that was left behind is sent when its successors' are."""
    tell(spec, lambda run: run.evaluation(EVALUATION), "evaluate.base")
    before = models(client, spec)
    tell(spec, lambda run: run.checkpoints(training(100, 200)))
    assert set(models(client, spec)) == {300}
    assert models(client, spec)[300].model_id == before[300].model_id
    assert models(client, spec)[300].tags["latentworks.trained_revision"] == "c" * 32


def test_figures_without_a_checkpoint_are_the_runs_alone(spec: TrackingSpec, client: Any) -> None:
    facts = EvaluationFacts(training(), {FD: 3.0}, (SELECT,))
    run_id = tell(spec, lambda run: run.evaluation(facts), "evaluate.base")
    assert client.get_run(run_id).data.metrics == {FD: 3.0}
    assert models(client, spec) == {}


def test_sending_twice_changes_nothing(spec: TrackingSpec, client: Any) -> None:
    """As after a crash between MLflow's answer and the note of it."""
    tracker = Tracker(spec)
    run = tracker.start_run("run")
    run.checkpoints(training(200, 300))
    run.evaluation(EVALUATION)
    assert tracker.flush(60)
    before = models(client, spec)
    journal = next((spec.state_dir / "spool").glob("*.jsonl"))
    shutil.copy(journal, journal.with_name("copy.jsonl"))  # without its progress
    assert run.finish(timeout_s=60)
    tell(spec, lambda run: run.metrics({"loss": 1.0}))
    assert not (spec.state_dir / "spool" / "copy.jsonl").exists()
    after = models(client, spec)
    assert {step: model.model_id for step, model in after.items()} == {300: before[300].model_id}
    assert len(after[300].metrics) == len(EVALUATION.figures)
    assert len(client.get_run(run.run_id).inputs.dataset_inputs) == 1


def test_runs_sort_by_a_figure_whose_name_has_slashes(spec: TrackingSpec, client: Any) -> None:
    name = "evaluate.base/kernel_distance/seen/efficientnet_lite0_128px"
    for value in (0.3, 0.1, 0.2):
        tell(spec, lambda run, value=value: run.metrics({name: value}))
    experiment = client.get_experiment_by_name(spec.experiment).experiment_id
    order = [f"metrics.`{name}` ASC"]
    found = client.search_runs([experiment], f"metrics.`{name}` > 0", order_by=order)
    assert [run.data.metrics[name] for run in found] == [0.1, 0.2, 0.3]


def test_while_the_server_is_away_all_of_it_is_in_the_journal(tmp_path: Path) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # nobody listens there
        run = Tracker(TrackingSpec(f"http://127.0.0.1:{reserved.getsockname()[1]}", "away", tmp_path)).start_run("run")
        started_s = time.monotonic()
        run.checkpoints(FINISHED)
        run.evaluation(EVALUATION)
        assert time.monotonic() - started_s < 5
        assert run.finish(timeout_s=0.1) is False
    (journal,) = (tmp_path / "spool").glob("*.jsonl")
    entries = {entry["kind"]: entry for entry in map(json.loads, journal.read_text().splitlines())}
    assert TrainingFacts.from_json(entries["checkpoints"]["facts"]) == FINISHED
    assert EvaluationFacts.from_json(entries["evaluation"]["facts"]) == EVALUATION
