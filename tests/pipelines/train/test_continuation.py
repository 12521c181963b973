"""Where a training begins: its own checkpoint, a finished training's, or nothing; and what of a finished one stays."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from infra.checkpoints import complete_checkpoints, publish_checkpoint
from infra.storage import Store
from pipelines.artifacts import Artifact, read_sealed
from pipelines.recipe import AutoencoderModel, Execution
from pipelines.train.checkpoint import Position
from pipelines.train.continuation import choose_start, keep_last_checkpoint, lineage
from pipelines.train.job import TrainJob
from pipelines.train.stage import identity


@pytest.fixture
def job(store: Store, autoencoder_model: AutoencoderModel) -> TrainJob:
    return TrainJob("autoencoder", autoencoder_model, {}, store, Execution(), "unit0", "line")


def trained(model: AutoencoderModel, **changes: Any) -> AutoencoderModel:
    return model.model_copy(update={"train": model.train.model_copy(update=changes)})


def asking(job: TrainJob, **changes: Any) -> TrainJob:
    return replace(job, model=trained(job.model, **changes))


def checkpoint(job: TrainJob, step: int, folder: Path, elapsed_s: float = 1.0) -> None:
    """What a checkpoint of the job has that is looked at before it is loaded."""
    local = folder / "checkpoint"
    local.mkdir(exist_ok=True)
    (local / "state").write_text(f"of step {step}")
    publish_checkpoint(job.store, job.checkpoints, local, step, asdict(Position(step, elapsed_s)))


def finish(job: TrainJob, steps: int, folder: Path, minutes: float = 1.0, **asked: Any) -> TrainJob:
    """A finished training of the job's lineage, of so many steps."""
    done = replace(asking(job, steps=steps, **asked), unit_key=f"unit of {steps}")
    checkpoint(done, steps, folder, 60 * minutes)
    keep_last_checkpoint(done)
    return done


def start_of(job: TrainJob) -> tuple[int | None, bool]:
    start = choose_start(job)
    return (None if start.ref is None else start.ref.step), start.continues


def test_the_longest_finished_training_that_is_shorter_is_gone_on_from(job: TrainJob, tmp_path: Path) -> None:
    assert start_of(asking(job, steps=100)) == (None, False)
    for steps in (20, 40, 80):
        finish(job, steps, tmp_path)
    for steps, expected in ((10, None), (20, None), (21, 20), (40, 20), (80, 40), (100, 80)):
        assert start_of(asking(job, steps=steps)) == (expected, expected is not None), steps
    assert start_of(replace(asking(job, steps=100), lineage="another")) == (None, False)
    assert start_of(replace(asking(job, steps=100), from_nothing=True)) == (None, False)


def test_minutes_count_on(job: TrainJob, tmp_path: Path) -> None:
    """The finished one was ended by its two minutes, at step 40."""
    finish(job, 40, tmp_path, minutes=2.0, max_minutes=2.0)
    assert start_of(asking(job, steps=1000, max_minutes=2.0)) == (None, False)
    assert start_of(asking(job, steps=1000, max_minutes=4.0)) == (40, True)
    assert start_of(asking(job, steps=1000)) == (40, True)
    assert start_of(asking(job, steps=30, max_minutes=4.0)) == (None, False)


def test_its_own_checkpoint_comes_first(job: TrainJob, tmp_path: Path) -> None:
    finish(job, 40, tmp_path)
    own = asking(job, steps=100)
    checkpoint(own, 10, tmp_path)
    assert start_of(own) == (10, False)
    assert choose_start(own).notes == ("train.autoencoder goes on from the checkpoint of step 10",)


def test_damaged_ones_are_told_and_passed_over(job: TrainJob, tmp_path: Path) -> None:
    finished = [finish(job, steps, tmp_path) for steps in (20, 40, 80)]
    asked = asking(job, steps=100)
    (pointer,) = [name for name in job.store.listdir("train.autoencoder/continuable/line") if "80" in name]
    job.store.publish_bytes(f"train.autoencoder/continuable/line/{pointer}", b"{}")
    state = f"{finished[1].checkpoints}/000000040/state"
    job.store.publish_bytes(state, job.store.read_bytes(state).swapcase())
    start = choose_start(asked)
    assert start.ref is not None
    assert start.ref.step == 20
    assert "can't go on from step 40 of a finished training: its checkpoint is damaged or gone" in start.notes[0]
    assert "goes on from step 20 of a finished training" in start.notes[1]
    job.store.delete(finished[0].checkpoints)
    nothing = choose_start(asked)
    assert nothing.ref is None
    assert len(nothing.notes) == 2


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_what_becomes_of_the_learning_rate_is_said(job: TrainJob, tmp_path: Path, schedule: str) -> None:
    optimizer = job.model.train.optimizer.model_copy(update={"schedule": schedule})
    alike = asking(job, optimizer=optimizer)
    finish(alike, 4000, tmp_path)
    (note,) = choose_start(asking(alike, steps=8000)).notes
    goes_on = "train.autoencoder goes on from step 4,000 of a finished training"
    assert note == {
        "cosine": f"{goes_on}; the cosine course is now over 8,000 steps: the learning rate goes on at 0.0005 (it had"
        " ended at 1.54e-10)",
        "constant": f"{goes_on}; the learning rate stays 0.001",
    }.get(schedule)
    timed = choose_start(asking(alike, steps=8000, max_minutes=4.0)).notes[0]
    assert ("over 8,000 steps or 4 minutes" in timed) == (schedule == "cosine")


def test_of_a_finished_training_the_last_checkpoint_stays(job: TrainJob, tmp_path: Path) -> None:
    keep_last_checkpoint(job)
    assert not job.store.exists("train.autoencoder/continuable")
    for step in (2, 4, 6):
        checkpoint(job, step, tmp_path)
    for _ in range(2):
        keep_last_checkpoint(job)
        assert [ref.step for ref in complete_checkpoints(job.store, job.checkpoints)] == [6]
    pointer = read_sealed(job.store, "train.autoencoder/continuable/line/000000006.json")
    assert (pointer["checkpoints"], pointer["step"], pointer["unit"]) == (job.checkpoints, 6, "unit0")


def test_a_lineage_is_of_all_but_the_length(autoencoder_model: AutoencoderModel, store: Store) -> None:
    def of(model: AutoencoderModel, revision: str = "r", format_version: int = 1) -> str:
        return lineage(
            identity(model).content, {"select": Artifact("select", "k", revision, {}, store)}, format_version
        )

    known = of(autoencoder_model)
    assert of(trained(autoencoder_model, steps=7)) == of(trained(autoencoder_model, max_minutes=1.0)) == known
    for other in (
        of(trained(autoencoder_model, seed=1)),
        of(trained(autoencoder_model, ema_decay=0.5)),
        of(autoencoder_model, revision="s"),
        of(autoencoder_model, format_version=2),
    ):
        assert other != known
