"""What MLflow knows of a run: from it alone one gets from a checkpoint to figures and their data, and sorts runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asked import asked

from infra.checkpoints import manifest_sha256, publish_checkpoint
from infra.storage import StorageError, Store
from infra.tracking import Tracker, TrackingSpec
from pipelines.artifacts import Artifact, Counts
from pipelines.building import building
from pipelines.dataset.figures import Figure, metrics_of, records
from pipelines.publishing import publish_unit
from pipelines.train.job import checkpoints_of
from pipelines.train.kept import kept_checkpoints
from pipelines.workflow.node import Node
from pipelines.workflow.tracked import data_of, tell_figures, tell_made, training_of

# MLflow 3.17 maps its tables in a way that SQLAlchemy 2.1 gives up.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

NET = "efficientnet_lite0_128px"
FIGURES = (
    Figure("kernel_distance", "seen", 0.05, NET, error=0.002, floor=0.002, untrained=0.31, count=256),
    Figure("frechet_distance", "seen", 169.25, NET, count=256),
    Figure("clip_score", "seen", 27.5, "judge", floor=33.0, count=256),
)
KID = f"evaluate.base/kernel_distance/seen/{NET}"
INPUTS = {
    "acquire": (),
    "select": ("acquire",),
    "train.autoencoder": ("acquire", "select"),
    "encode.base": ("acquire", "select", "train.autoencoder"),
    "train.base": ("encode.base", "train.autoencoder"),
    "evaluate.base": ("train.base", "train.autoencoder", "acquire", "select"),
}


class Away(Store):
    """A store that lists, and then is away."""

    def read_bytes(self, path: str) -> bytes:
        raise StorageError("no answer")


def nodes() -> dict[str, Node]:
    nothing: Any = None
    return {name: Node(name, inputs, 1, nothing, nothing) for name, inputs in INPUTS.items()}


def made(store: Store, name: str, info: dict[str, Any], **settings: Any) -> Artifact:
    with building(store, name, asked(settings), {}, {}, 1) as build:
        unit = publish_unit(store, name, build.unit_key(settings), {"a": name.encode()}, Counts(1, 1), info)
        return build.publish([unit], info=info)


def artifacts(store: Store, folder: Path, figures: tuple[Figure, ...] = FIGURES) -> dict[str, Artifact]:
    """As after a run whose training kept the checkpoint of its last step."""
    found = {name: made(store, name, {}, train={"global_batch_size": 32}) for name in list(INPUTS)[:-1]}
    found["evaluate.base"] = made(store, "evaluate.base", {"figures": records(figures)})
    folder.mkdir()
    (folder / "rank_00000.safetensors").write_bytes(b"weights")
    (unit,) = found["train.base"].units
    publish_checkpoint(store, checkpoints_of("train.base", unit.key), folder, 300, {"step": 300})
    return found


def workflow(tracker: Tracker, known: dict[str, Artifact]) -> None:
    run = tracker.start_run("workflow")
    for name in ("train.base", "evaluate.base"):
        node = run.child(name, {"node": name})
        tell_made(node, nodes()[name], nodes(), known)
        node.finish()
    for name, artifact in known.items():
        tell_figures(run, name, artifact)
    assert run.finish(timeout_s=120)


def test_the_chain_from_a_checkpoint_to_figures_to_data_and_runs_by_their_figures(tmp_path: Path) -> None:
    import mlflow

    store, spec = Store(tmp_path / "store"), TrackingSpec(None, "mine", tmp_path / "state")
    known = artifacts(store, tmp_path / "checkpoint")
    workflow(Tracker(spec), known)
    better = replace(known["evaluate.base"], manifest=dict(known["evaluate.base"].manifest))
    better.manifest["info"] = {"figures": records([replace(FIGURES[0], value=0.01)])}
    later = Tracker(spec)
    run = later.start_run("workflow")  # in which all was up to date but the figures
    tell_figures(run, "evaluate.base", better)
    assert run.finish(timeout_s=60)

    client = mlflow.MlflowClient(spec.resolved_uri)  # from here on MLflow alone
    experiment = client.get_experiment_by_name("mine").experiment_id
    (model,) = client.search_logged_models([experiment], "params.`step` = '300'")
    folder = Path(model.tags["latentworks.location"])
    assert (folder / "rank_00000.safetensors").read_bytes() == b"weights"
    assert model.params["images"] == str(300 * 32)
    figures = {metric.key: metric for metric in model.metrics}
    assert {key: metric.value for key, metric in figures.items()} == metrics_of(FIGURES)
    for key in (f"frechet_distance/seen/{NET}", "clip_score/seen/judge"):
        measured = client.get_run(figures[key].run_id)
        assert measured.data.tags["node"] == "evaluate.base"
        data = {one.dataset.name: one.dataset for one in measured.inputs.dataset_inputs}
        assert set(data) == {"select", "acquire"}
        assert data[figures[key].dataset_name].digest == figures[key].dataset_digest == known["select"].revision
        assert store.location(known["select"].path) in data["select"].source
    trained = client.get_run(model.source_run_id)
    assert trained.data.tags["node"] == "train.base"
    (ref,) = (tmp_path / "store").glob("train.base/unfinished/*/checkpoints/*")
    assert folder == ref
    kept = training_of("train.base", nodes(), known)
    assert kept is not None
    assert kept.checkpoints[0].manifest_sha256 == model.tags["latentworks.manifest_sha256"]
    assert model.tags["latentworks.trained_revision"] == known["train.base"].revision

    runs = client.search_runs([experiment], f"metrics.`{KID}` > 0", order_by=[f"metrics.`{KID}` ASC"])
    assert [found.data.metrics[KID] for found in runs] == [0.01, 0.05]
    assert {found.info.run_name for found in runs} == {"workflow"}


def test_the_data_is_found_behind_what_a_node_is_made_from(tmp_path: Path) -> None:
    known = artifacts(Store(tmp_path / "store"), tmp_path / "checkpoint")
    for name in ("train.base", "evaluate.base"):
        found = data_of(name, nodes(), known)
        assert [(data.name, data.revision) for data in found] == [
            (data, known[data].revision) for data in ("select", "acquire")
        ]


def test_a_training_without_checkpoints_has_none_and_a_store_that_is_away_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path / "store")
    none = kept_checkpoints(store, "train.base", "0" * 32, 32)
    assert none is not None
    assert none.checkpoints == ()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "rank_00000.safetensors").write_bytes(b"")
    ref = publish_checkpoint(store, checkpoints_of("train.base", "k"), folder, 7, {})
    kept = kept_checkpoints(store, "train.base", "k", 32)
    assert kept is not None
    assert [(one.step, one.images, one.manifest_sha256) for one in kept.checkpoints] == [
        (7, 224, manifest_sha256(store, ref))
    ]
    assert kept_checkpoints(Away(store.url), "train.base", "k", 32) is None
    assert "tracking is not told which checkpoints are kept: no answer" in caplog.text
