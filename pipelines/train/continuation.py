"""Where a training begins: at its own last checkpoint, at the end of a shorter one that is finished, or at nothing.

A finished training's last checkpoint stays, and `<node>/continuable/<lineage>/<step>.json` leads to it. A *lineage* is
all that decides over a training's steps one by one: its content but for how many steps or minutes, its inputs, the
format. So a training of the same lineage that is to be longer goes on where the shorter one ended.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from infra.checkpoints import CheckpointRef, complete_checkpoints, newest_sound_checkpoint, prune_checkpoints
from pipelines.artifacts import Artifact, Damaged, digest, read_sealed, revisions, sealed
from pipelines.recipe import TrainSpec
from pipelines.train.checkpoint import Position
from pipelines.train.job import TrainJob
from pipelines.train.schedule import learning_rate, progress

logger = logging.getLogger(__name__)

LENGTH = ("steps", "max_minutes")
"""Fields of `TrainSpec` that say how long, and are no part of a lineage."""


@dataclass(frozen=True)
class Finished:
    """A finished training, as the store remembers it. `checkpoints` is the folder in the store with its last one,
    `unit` the key of what was published."""

    checkpoints: str
    step: int
    unit: str
    steps: int
    max_minutes: float | None


FINISHED = {"checkpoints": str, "step": int, "unit": str, "steps": int, "max_minutes": object}


@dataclass(frozen=True)
class Start:
    """The checkpoint to begin from, and what a person is to be told of it. None: from nothing."""

    ref: CheckpointRef | None
    notes: tuple[str, ...] = ()
    continues: bool = False
    """Whether the checkpoint is a finished training's."""


def lineage(content: Mapping[str, Any], inputs: Mapping[str, Artifact], format_version: int) -> str:
    """Hash of what is asked for, but for how long: `content` as `stage.identity` has it."""
    train = {name: value for name, value in content["train"].items() if name not in LENGTH}
    return digest({"format": format_version, "content": {**content, "train": train}, "inputs": revisions(inputs)})


def choose_start(job: TrainJob) -> Start:
    """Where `job` begins. Call it on one rank: checkpoints that prove to be damaged are set aside.

    Raises `StorageError` if the store doesn't answer.
    """
    own = newest_sound_checkpoint(job.store, job.checkpoints)
    if own is not None:
        return Start(own, (f"{job.node} goes on from the checkpoint of step {own.step:,}",))
    spec, notes = job.model.train, []
    for finished in [] if job.from_nothing else _finished(job):
        if progress(spec, finished.step, 0.0) == 1:
            continue
        ref = newest_sound_checkpoint(job.store, finished.checkpoints)
        if ref is None:
            notes.append(
                f"{job.node} can't go on from step {finished.step:,} of a finished training: its checkpoint is damaged"
                " or gone"
            )
            continue
        position = Position(**ref.info)
        if progress(spec, position.step, position.elapsed_s) < 1:
            return Start(ref, (*notes, f"{job.node} {_course(spec, finished, position)}"), continues=True)
    return Start(None, tuple(notes))


def keep_last_checkpoint(job: TrainJob) -> None:
    """Have the newest sound checkpoint of a finished training found by a longer one, and delete the others.

    Safe to repeat. A training that left none, of before there was such a thing, is left alone.
    """
    refs = complete_checkpoints(job.store, job.checkpoints)
    if not refs:
        return
    spec = job.model.train
    finished = Finished(job.checkpoints, refs[0].step, job.unit_key, spec.steps, spec.max_minutes)
    job.store.publish_bytes(f"{_folder(job)}/{finished.step:09d}.json", sealed(asdict(finished)))
    prune_checkpoints(job.store, job.checkpoints, keep=1)


def _finished(job: TrainJob) -> list[Finished]:
    """Finished trainings of the job's lineage, the longest first."""
    found = []
    for name in reversed(job.store.listdir(_folder(job))):
        try:
            values = read_sealed(job.store, f"{_folder(job)}/{name}", FINISHED)
        except (FileNotFoundError, Damaged) as error:
            logger.warning("a finished training of %s is passed over: %s", job.node, error)
        else:
            found.append(Finished(**{name: values[name] for name in Finished.__dataclass_fields__}))
    return found


def _folder(job: TrainJob) -> str:
    return f"{job.node}/continuable/{job.lineage}"


def _course(spec: TrainSpec, finished: Finished, position: Position) -> str:
    """What becomes of the learning rate, in words."""
    step, elapsed_s = position.step, position.elapsed_s
    goes_on = f"goes on from step {step:,} of a finished training"
    rate = learning_rate(spec.optimizer, step, progress(spec, step, elapsed_s))
    if spec.optimizer.schedule == "constant":
        return f"{goes_on}; the learning rate stays {rate:.3g}"
    before = spec.model_copy(update={"steps": finished.steps, "max_minutes": finished.max_minutes})
    last_made = progress(before, step - 1, elapsed_s * (step - 1) / step)
    ended = learning_rate(spec.optimizer, step - 1, last_made)
    length = f"{spec.steps:,} steps" + ("" if spec.max_minutes is None else f" or {spec.max_minutes:g} minutes")
    return (
        f"{goes_on}; the {spec.optimizer.schedule} course is now over {length}: the learning rate goes on at {rate:.3g}"
        f" (it had ended at {ended:.3g})"
    )
