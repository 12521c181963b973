"""Training under Ray Train on a real local cluster: two ranks, a rank that dies, an error that no restart mends."""

import contextlib
import os
import signal
import threading
import time
from dataclasses import replace

import psutil
import pytest

from infra.cluster import ClusterSpec, cluster
from infra.ranks import DeviceUnavailable
from pipelines.again import ask_again
from pipelines.artifacts import Artifact, artifact_key
from pipelines.building import building
from pipelines.dataset.errors import CacheMismatch
from pipelines.errors import LatentworksError
from pipelines.recipe import Execution
from pipelines.reporting import LogReport
from pipelines.train.errors import TrainError
from pipelines.train.job import TrainJob
from pipelines.train.launch import _portable, choose_device
from pipelines.train.stage import FORMAT_VERSION, identity, make_job, train

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
        self.starts = 0

    def metrics(self, values, step=None) -> None:
        if "loss" in values:
            self.losses[step] = values["loss"]

    def figure(self, name, png) -> None:
        self.figures[name] = png

    def progress(self, done, total, unit, note="") -> None:
        self.starts += (done, unit) == (0, "ranks")

    def note(self, message) -> None:
        self.notes.append(message)


class TwoParts(LatentworksError):
    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} in {where}")


def test_an_error_that_cannot_be_sent_comes_as_its_message_and_the_log_says_why(caplog) -> None:
    sent = _portable(TwoParts("a fault", "a file"))
    assert (type(sent), str(sent)) == (TrainError, "a fault in a file")
    assert "TwoParts" in caplog.text
    assert "missing 1 required positional argument: 'where'" in caplog.text


@pytest.fixture(scope="module")
def ray_cluster():
    with cluster(ClusterSpec(num_cpus=2)):
        yield


def run(job, report) -> Artifact:
    return train(job.name, job.model, job.inputs, job.store, report, EXECUTION)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_ranks_train_report_and_publish(store, base_job):
    report = Recorder()
    artifact = run(base_job, report)
    assert sorted(report.losses) == [1, 2, 3, 4, 5, 6]
    assert sorted(report.figures) == ["samples/final.png", "samples/step_000004.png"]
    assert artifact.stage == "train.base"
    assert artifact.info["steps"] == 6
    assert artifact.counts.kept == artifact.counts.total == 20
    assert store.read_bytes(artifact.units[0].path("preview.png")) == report.figures["samples/final.png"]
    (unfinished,) = store.listdir("train.base/unfinished")
    assert store.listdir(f"train.base/unfinished/{unfinished}") == ["checkpoints"]  # of the last step, to go on from
    assert store.listdir(f"train.base/unfinished/{unfinished}/checkpoints") == ["000000006"]

    again = Recorder()
    assert run(base_job, again) == artifact
    assert again.losses == {}


def test_force_begins_from_nothing(base_job):
    def made(inputs) -> TrainJob:
        with building(base_job.store, base_job.node, identity(base_job.model), inputs, {}, FORMAT_VERSION) as build:
            return make_job(build, base_job.name, base_job.model, Execution())

    plain = made(base_job.inputs)
    key = artifact_key(base_job.node, FORMAT_VERSION, identity(base_job.model).content, base_job.inputs)
    ask_again(base_job.store, base_job.node, key, "force")
    forced = made(base_job.inputs)
    assert (plain.from_nothing, forced.from_nothing) == (False, True)
    assert plain.lineage == forced.lineage
    assert plain.checkpoints != forced.checkpoints


def test_a_recipe_gets_the_device_that_it_asks_for_or_is_refused(base_job):
    report = Recorder()

    def chosen(device: str, gpus: int, ranks: int = 2) -> str:
        job = replace(base_job, execution=Execution(device=device, ranks=ranks))
        return choose_device(job, {"CPU": 8.0, **({"GPU": float(gpus)} if gpus else {})}, report)

    assert [chosen("cpu", 2), chosen("auto", 0), chosen("auto", 2), chosen("cuda", 2)] == ["cpu", "cpu", "cuda", "cuda"]
    assert report.notes == []
    with pytest.raises(
        DeviceUnavailable, match=r"is cuda, but the cluster has 0 GPUs.* 2 ranks .*; set execution.device"
    ):
        chosen("cuda", 0)
    with pytest.raises(
        DeviceUnavailable, match=r"has 1 GPUs, .*set execution.ranks to 1 or fewer, or execution.device"
    ):
        chosen("cuda", 1)
    assert chosen("auto", 1) == "cpu"
    assert "train.base trains on the CPU: the cluster has 1 GPUs" in report.notes[0]


def test_what_decides_how_it_runs_is_no_part_of_the_key(base_job):
    model = base_job.model
    sampling = model.sampling.model_copy(update={"prompts": ("other",)})
    assert identity(model.model_copy(update={"sampling": sampling})) == identity(model)
    longer = model.train.model_copy(update={"steps": 7})
    assert identity(model.model_copy(update={"train": longer})) != identity(model)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_rank_that_dies_is_started_again_and_a_longer_training_goes_on(base_job):
    spec = base_job.model.train.model_copy(update={"steps": 40})
    job = replace(base_job, model=base_job.model.model_copy(update={"train": spec}))
    report = Recorder()
    killer = threading.Thread(target=kill_a_rank, args=(report,))
    killer.start()
    artifact = run(job, report)
    killer.join()
    assert any("goes on from the checkpoint of step" in note for note in report.notes)
    told = (
        "train.base: rank 1 died: its process ended without a word, or was killed; it goes on from the last checkpoint"
    )
    assert f"{told}, attempt 2 of 3" in report.notes
    assert sorted(report.losses) == list(range(1, 41))
    assert artifact.info["steps"] == 40

    longer = Recorder()
    artifact = run(
        replace(job, model=job.model.model_copy(update={"train": spec.model_copy(update={"steps": 42})})), longer
    )
    assert sorted(longer.losses) == [41, 42]
    assert artifact.info["continued_from"] == 40


def kill_a_rank(report: Recorder) -> None:
    while 6 not in report.losses:
        time.sleep(0.05)
    ranks = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # others come and go meanwhile
            ranks += [process] if "RayTrainWorker" in " ".join(process.cmdline()) else []
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_error_that_no_restart_mends_is_raised_as_it_is(base_job, latents):
    inputs = {**base_job.inputs, "encode.base": latents(autoencoder_sha256="other")}
    report = Recorder()
    with pytest.raises(CacheMismatch, match="autoencoder_sha256 'other'"):
        run(replace(base_job, inputs=inputs), report)
    assert report.starts == 1
