"""The training loop: what each rank does from the first step, or a checkpoint, to the published model.

Knows no launcher: a process group and the usual environment (`LOCAL_RANK`, `LOCAL_WORLD_SIZE`) are there when
`train_worker` is called, the same on every rank.
"""

from __future__ import annotations

import json
import logging
import math
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from infra.engine import Engine, EngineSpec
from ldm.ema import decay_at
from pipelines.artifacts import Counts
from pipelines.dataset.figures import FIGURES, finite, metrics_of, records
from pipelines.publishing import publish_unit
from pipelines.recipe import Execution, TrainSpec
from pipelines.recipe.plugins import load_plugins
from pipelines.reporting import Report
from pipelines.train.checkpoint import Checkpoints, Position
from pipelines.train.continuation import choose_start
from pipelines.train.errors import InputMissing, TrainError
from pipelines.train.job import TrainJob
from pipelines.train.kept import kept_checkpoints
from pipelines.train.kinds import build_trainable
from pipelines.train.meter import Meter
from pipelines.train.order import Order
from pipelines.train.ranks import Ranks, all_cores
from pipelines.train.schedule import by_minutes, learning_rate, progress
from pipelines.train.step import train_step
from pipelines.train.trainable import Preview, Trainable, Weights

ENDING = ("saving the last checkpoint", "saving the model", "measuring")
"""What is done after the last step, for people who wait."""

logger = logging.getLogger(__name__)


def train_worker(job: TrainJob, report: Report) -> None:
    """Train the job's model together with the other ranks; rank 0 publishes it as unit `job.unit_key`.

    Goes on from the job's latest checkpoint, or from a finished training that was shorter. `report` is used on rank 0
    alone.

    Raises:
        TrainError, DatasetError: the model can't be trained on this data, by this many ranks, or here.
        PluginError: a plugin that previews need can't be run here.
        infra.engine.EngineError: gradients stay non-finite, or the engine can't be built.
    """
    ranks = Ranks.current()
    load_plugins(job.plugins)
    try:
        with ranks.threads(job.execution.cpus):
            training = Training.prepare(job, report, ranks)
            training.run()
            training.finish()
    except FileNotFoundError as error:
        raise _of_inputs(job, ranks, error) or error from error


@dataclass
class Training:
    """One training under way on one rank."""

    job: TrainJob
    report: Report
    ranks: Ranks
    trainable: Trainable
    order: Order
    engine: Engine
    checkpoints: Checkpoints
    position: Position
    """How far training is."""
    saved_step: int | None
    """Step of the latest checkpoint of this training's own."""
    counts_minutes: bool = False
    """Progress was last told by time."""

    @classmethod
    def prepare(cls, job: TrainJob, report: Report, ranks: Ranks) -> Training:
        """Data, model and engine, as they were where training is to begin."""
        # what is to be done, and where
        spec = job.model.train
        device = ranks.device(job.execution.device)
        engine_spec = make_engine_spec(spec, job.execution, ranks.world_size, device)
        if ranks.rank == 0:
            report.progress(ranks.world_size, ranks.world_size, "ranks", "loading")
        # data, network, and the order of samples
        trainable = build_trainable(job, device, previews=ranks.rank == 0)
        order = Order(
            seed=spec.seed,
            revision=trainable.revision,
            num_rows=trainable.num_samples,
            lanes=spec.lanes,
            global_batch_size=spec.global_batch_size,
        )
        # the network sharded over the ranks, with its optimizer
        engine = Engine.build(trainable.module, engine_spec)
        # resume: rank 0 chooses the checkpoint, all ranks load their shard of it
        checkpoints = Checkpoints(job.store, job.checkpoints, keep=job.execution.keep_checkpoints)
        start = ranks.shared(choose_start(job) if ranks.rank == 0 else None)
        assert start is not None, "rank 0 has chosen"
        position = checkpoints.load(engine, start.ref) if start.ref is not None else Position()
        if start.continues:
            position = replace(position, continued_from=position.step)
        if ranks.rank == 0:
            for note in start.notes:
                report.note(note)
        saved_step = position.step if start.ref is not None and not start.continues else None
        return cls(job, report, ranks, trainable, order, engine, checkpoints, position, saved_step)

    @property
    def spec(self) -> TrainSpec:
        return self.job.model.train

    def run(self) -> None:
        """Steps until the end, with what is due between them."""
        execution = self.job.execution
        meter = Meter(self.ranks, self.engine.device)
        clock = Clock(self.position.elapsed_s)
        while (made := progress(self.spec, self.position.step, self.position.elapsed_s)) < 1:
            # this rank's share of the global batch
            step = self.position.step
            rate = learning_rate(self.spec.optimizer, step, made)
            samples = self.order.block(step, self.ranks.rank, self.ranks.world_size)
            # forward, backward, update of weights and average
            with meter.timed():
                result = train_step(self.engine, self.trainable, samples, rate, decay_at(step, self.spec.ema_decay))
            meter.add(result)
            self.position = replace(self.position, step=step + 1, elapsed_s=self._agreed(clock.elapsed_s()))
            # what is due after so many steps
            if self._due(execution.log_every_steps) or progress(self.spec, step + 1, self.position.elapsed_s) == 1:
                self._log(meter, rate)
            if self._due(execution.sample_every_steps):
                self._preview()
            if self._due(execution.checkpoint_every_steps):
                self._save()

    def finish(self) -> None:
        """Rank 0 publishes the averaged weights and measures them; the others wait."""
        self._tell_ending(0)
        if self.saved_step != self.position.step:
            self._save()
        weights = self.engine.gather("ema")
        if weights is not None:
            with all_cores(self.job.execution.cpus), tempfile.TemporaryDirectory(prefix="ldm-train-") as folder:
                self._publish(weights, Path(folder))
        self.ranks.wait()
        self.engine.close()

    def _publish(self, weights: Weights, folder: Path) -> None:
        self._tell_ending(1)
        written = self.trainable.write(weights, folder)
        self._tell_ending(2)
        preview = self._looked(self.trainable.measure, weights, "of the finished model")
        preview = replace(preview, figures=[*preview.figures, *written])
        self._show(preview, "final")
        step = self.position.step
        facts = {"steps": step, "images": step * self.spec.global_batch_size}
        published = {**facts, FIGURES: records(preview.figures)}
        (folder / "training.json").write_text(json.dumps(published, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for png in preview.pictures.values():
            (folder / "preview.png").write_bytes(png)
        files: dict[str, Path | bytes] = {
            path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
        }
        count = self.trainable.num_samples
        info: dict[str, Any] = {**facts, "seconds": round(self.position.elapsed_s, 1), "ranks": self.ranks.world_size}
        info[FIGURES] = records([*preview.figures, *preview.beside])
        if self.position.continued_from is not None:
            info["continued_from"] = self.position.continued_from
        publish_unit(self.job.store, self.job.node, self.job.unit_key, files, Counts(count, count), info)
        self._tell_ending(3)

    def _save(self) -> None:
        self.checkpoints.save(self.engine, self.position)
        self.saved_step = self.position.step
        if self.ranks.rank == 0:
            kept = kept_checkpoints(self.job.store, self.job.node, self.job.unit_key, self.spec.global_batch_size)
            if kept is not None:
                self.report.checkpoints(kept)

    def _log(self, meter: Meter, rate: float) -> None:
        means = meter.means(self.spec.global_batch_size)
        if self.ranks.rank == 0:
            self.report.metrics({**means, "learning_rate": rate, "epoch": self._epoch()}, self.position.step)
            self._tell_progress(f"loss {means['loss']:.4f}, {means['images_per_s']:.0f} images/s")

    def _tell_progress(self, note: str) -> None:
        """By whichever ends training: steps, or minutes, of which alone the total is known then."""
        spec, step, elapsed_s = self.spec, self.position.step, self.position.elapsed_s
        by_steps, by_time = step / spec.steps, by_minutes(spec, elapsed_s)
        if abs(by_steps - by_time) > 0.02:  # else as last time: they may run side by side
            self.counts_minutes = by_time > by_steps
        if self.counts_minutes and spec.max_minutes is not None:
            total_s = math.ceil(60 * spec.max_minutes)
            done_s = total_s if progress(spec, step, elapsed_s) == 1 else min(int(elapsed_s), total_s)
            self.report.progress(done_s, total_s, "seconds", f"step {step:,}, {note}")
        else:
            total = step if progress(spec, step, elapsed_s) == 1 else spec.steps
            self.report.progress(step, total, "steps", note)

    def _tell_ending(self, done: int) -> None:
        if self.ranks.rank == 0:
            self.report.progress(done, len(ENDING), "parts", ENDING[done] if done < len(ENDING) else "")

    def _preview(self) -> None:
        weights = self.engine.gather("ema")
        if weights is not None:
            with all_cores(self.job.execution.cpus):
                step = self.position.step
                self._show(self._looked(self.trainable.preview, weights, f"at step {step:,}"), f"step_{step:06d}")
        self.ranks.wait()

    def _looked(self, look: Callable[[Weights], Preview], weights: Weights, when: str) -> Preview:
        """What `look` finds. Where it fails there is nothing but a note: no picture is worth a training."""
        try:
            found = look(weights)
            metrics_of([*found.figures, *found.beside])  # that no two have one label
        except Exception as error:
            logger.exception("%s: no preview %s", self.job.node, when)
            self.report.note(f"{self.job.node}: no preview {when}: {type(error).__name__}: {error}")
            return Preview()
        (figures, odd), (beside, odd_beside) = finite(found.figures), finite(found.beside)
        if odd or odd_beside:
            names = ", ".join([*odd, *odd_beside])
            self.report.note(f"{self.job.node}: left out {when}, since they are not finite: {names}")
        return Preview(found.pictures, figures, beside)

    def _show(self, preview: Preview, place: str) -> None:
        for name, png in preview.pictures.items():
            self.report.figure(f"{name}/{place}.png", png)
        figures = [*preview.figures, *preview.beside]
        if figures:
            self.report.metrics(metrics_of(figures), self.position.step)

    def _due(self, every_steps: int) -> bool:
        return self.position.step % every_steps == 0

    def _epoch(self) -> float:
        return self.position.step * self.spec.global_batch_size / self.trainable.num_samples

    def _agreed(self, elapsed_s: float) -> float:
        """Rank 0's clock decides where time does, so that all ranks end at the same step."""
        return elapsed_s if self.spec.max_minutes is None else self.ranks.agreed(elapsed_s)


class Clock:
    """Seconds of training, those before a resume included."""

    def __init__(self, before_s: float) -> None:
        self._started_s = time.monotonic() - before_s

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s


def make_engine_spec(spec: TrainSpec, execution: Execution, world_size: int, device: torch.device) -> EngineSpec:
    """Raises `TrainError` if ranks times micro-batch does not divide the global batch."""
    size, rest = divmod(spec.global_batch_size, world_size)
    micro_batch_size = execution.micro_batch_size or size
    if rest or size % micro_batch_size:
        raise TrainError(
            f"{world_size} ranks x micro_batch_size {micro_batch_size} must divide global_batch_size"
            f" ({spec.global_batch_size}); change execution.ranks or execution.micro_batch_size"
        )
    optimizer = spec.optimizer
    return EngineSpec(
        zero_stage=execution.zero_stage,
        micro_batch_size=micro_batch_size,
        gradient_accumulation_steps=size // micro_batch_size,
        precision=spec.precision,
        learning_rate=optimizer.learning_rate,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        ema_decay=spec.ema_decay,
        device="cuda" if device.type == "cuda" else "cpu",
        offload_optimizer=execution.offload_optimizer,
    )


def _of_inputs(job: TrainJob, ranks: Ranks, error: FileNotFoundError) -> InputMissing | None:
    """The same, if the file is one of an input's: trying again won't bring it back."""
    for node in job.inputs:
        if f"{node}/units/" in str(error):
            return InputMissing(
                f"rank {ranks.rank} on {socket.gethostname()} misses a file of {node}: {error}. A store in a local"
                " folder must be the same folder on every machine; if the file is gone, `ldm store verify RECIPE"
                " --repair` has it made again"
            )
    return None
