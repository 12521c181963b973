"""Training under Ray Train on a real local cluster: two ranks, a rank that dies, an error that no restart mends."""

import os
import signal
import threading
import time
from dataclasses import replace

import psutil
import pytest

from infra.cluster import ClusterSpec, cluster
from pipelines.artifacts import Artifact
from pipelines.dataset.errors import CacheMismatch
from pipelines.recipe import Execution
from pipelines.reporting import LogReport
from pipelines.train.stage import identity, train

# Ray Data's own defaults trip over its own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

EXECUTION = Execution(
    device="cpu", cpus=2, ranks=2, zero_stage=2, log_every_steps=1, checkpoint_every_steps=2, sample_every_steps=4
)


class Recorder(LogReport):
    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.figures: dict[str, bytes] = {}
        self.notes: list[str] = []

    def metrics(self, values, step=None) -> None:
        if "loss" in values:
            self.losses[step] = values["loss"]

    def figure(self, name, png) -> None:
        self.figures[name] = png

    def note(self, message) -> None:
        self.notes.append(message)


@pytest.fixture(scope="module", autouse=True)
def ray_cluster():
    with cluster(ClusterSpec(num_cpus=2)):
        yield


def run(job, report) -> Artifact:
    return train(job.name, job.model, job.inputs, job.store, report, EXECUTION)


@pytest.mark.slow
def test_two_ranks_train_report_and_publish(store, base_job):
    report = Recorder()
    artifact = run(base_job, report)
    assert sorted(report.losses) == [1, 2, 3, 4, 5, 6]
    assert sorted(report.figures) == ["samples/final.png", "samples/step_000004.png"]
    assert artifact.stage == "train.base"
    assert artifact.info["steps"] == 6
    assert artifact.counts.kept == artifact.counts.total == 20
    assert store.read_bytes(artifact.units[0].path("preview.png")) == report.figures["samples/final.png"]
    assert store.listdir("train.base/unfinished") == []

    again = Recorder()
    assert run(base_job, again) == artifact
    assert again.losses == {}


def test_what_decides_how_it_runs_is_no_part_of_the_key(base_job):
    model = base_job.model
    sampling = model.sampling.model_copy(update={"prompts": ("other",)})
    assert identity(model.model_copy(update={"sampling": sampling})) == identity(model)
    longer = model.train.model_copy(update={"steps": 7})
    assert identity(model.model_copy(update={"train": longer})) != identity(model)


@pytest.mark.slow
def test_a_rank_that_dies_is_started_again_and_the_result_is_the_same(store, base_job):
    spec = base_job.model.train.model_copy(update={"steps": 40})
    job = replace(base_job, model=base_job.model.model_copy(update={"train": spec}))
    report = Recorder()
    killer = threading.Thread(target=kill_a_rank, args=(report,))
    killer.start()
    artifact = run(job, report)
    killer.join()
    assert any("goes on from the checkpoint of step" in note for note in report.notes)
    assert sorted(report.losses) == list(range(1, 41))

    store.delete("train.base")
    undisturbed = run(job, Recorder())
    assert undisturbed.revision == artifact.revision


def kill_a_rank(report: Recorder) -> None:
    while 6 not in report.losses:
        time.sleep(0.05)
    ranks = [
        process
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGKILL)


@pytest.mark.slow
def test_an_error_that_no_restart_mends_is_raised_as_it_is(base_job, latents):
    inputs = {**base_job.inputs, "encode.base": latents(autoencoder_sha256="other")}
    with pytest.raises(CacheMismatch, match="autoencoder_sha256 'other'"):
        run(replace(base_job, inputs=inputs), Recorder())
