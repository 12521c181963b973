"""The training loop: what each rank does from the first step, or the latest checkpoint, to the published model.

Knows no launcher: a process group and the usual environment (`LOCAL_RANK`, `LOCAL_WORLD_SIZE`) are there when
`train_worker` is called, the same on every rank.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from infra.engine import Engine, EngineSpec
from ldm.ema import decay_at
from ldm.errors import GenerationError
from pipelines.artifacts import Counts
from pipelines.building import publish_unit
from pipelines.recipe import Execution, TrainSpec
from pipelines.reporting import Report
from pipelines.train.checkpoint import Checkpoints, Position
from pipelines.train.errors import TrainError
from pipelines.train.job import TrainJob
from pipelines.train.kinds import build_trainable
from pipelines.train.meter import Meter
from pipelines.train.order import Order
from pipelines.train.ranks import Ranks, all_cores
from pipelines.train.schedule import learning_rate, progress
from pipelines.train.step import train_step
from pipelines.train.trainable import Preview, Trainable, Weights

logger = logging.getLogger(__name__)


def train_worker(job: TrainJob, report: Report) -> None:
    """Train the job's model together with the other ranks; rank 0 publishes it as unit `job.unit_key`.

    Goes on from the job's latest checkpoint. `report` is used on rank 0 alone.

    Raises:
        TrainError, DatasetError: the model can't be trained on this data, or by this many ranks.
        infra.engine.EngineError: gradients stay non-finite, or the engine can't be built.
    """
    ranks = Ranks.current()
    with ranks.threads(job.execution.cpus):
        training = Training.prepare(job, report, ranks)
        training.run()
        training.finish()


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

    @classmethod
    def prepare(cls, job: TrainJob, report: Report, ranks: Ranks) -> Training:
        """Data, model and engine, as they were at the latest checkpoint."""
        spec = job.model.train
        device = ranks.device(job.execution.device)
        engine_spec = make_engine_spec(spec, job.execution, ranks.world_size, device)
        trainable = build_trainable(job, device, previews=ranks.rank == 0)
        order = Order(
            seed=spec.seed,
            revision=trainable.revision,
            num_rows=trainable.num_samples,
            lanes=spec.lanes,
            global_batch_size=spec.global_batch_size,
        )
        engine = Engine.build(trainable.module, engine_spec)
        checkpoints = Checkpoints(job.store, job.checkpoints, keep=job.execution.keep_checkpoints)
        position = checkpoints.resume(engine)
        if position.step and ranks.rank == 0:
            report.note(f"{job.node} goes on from the checkpoint of step {position.step}")
        return cls(job, report, ranks, trainable, order, engine, checkpoints, position)

    @property
    def spec(self) -> TrainSpec:
        return self.job.model.train

    def run(self) -> None:
        """Steps until the end, with what is due between them."""
        execution = self.job.execution
        meter = Meter(self.ranks, self.engine.device)
        clock = Clock(self.position.elapsed_s)
        while (made := progress(self.spec, self.position.step, self.position.elapsed_s)) < 1:
            step = self.position.step
            rate = learning_rate(self.spec.optimizer, step, made)
            samples = self.order.block(step, self.ranks.rank, self.ranks.world_size)
            with meter.timed():
                result = train_step(self.engine, self.trainable, samples, rate, decay_at(step, self.spec.ema_decay))
            meter.add(result)
            self.position = Position(step + 1, self._agreed(clock.elapsed_s()))
            if self._due(execution.log_every_steps) or progress(self.spec, step + 1, self.position.elapsed_s) == 1:
                self._log(meter, rate)
            if self._due(execution.sample_every_steps):
                self._preview()
            if self._due(execution.checkpoint_every_steps):
                self.checkpoints.save(self.engine, self.position)

    def finish(self) -> None:
        """Rank 0 measures the averaged weights and publishes them; the others wait."""
        weights = self.engine.gather("ema")
        if weights is not None:
            with all_cores(self.job.execution.cpus), tempfile.TemporaryDirectory(prefix="ldm-train-") as folder:
                self._publish(weights, Path(folder))
        dist.barrier()
        self.engine.close()

    def _publish(self, weights: Weights, folder: Path) -> None:
        preview = self.trainable.finish(weights, folder)
        self._show(preview, None)
        step = self.position.step
        facts = {"steps": step, "images": step * self.spec.global_batch_size, **preview.metrics}
        (folder / "training.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for png in preview.figures.values():
            (folder / "preview.png").write_bytes(png)
        files: dict[str, Path | bytes] = {
            path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
        }
        count = self.trainable.num_samples
        timing = {"seconds": round(self.position.elapsed_s, 1), "ranks": self.ranks.world_size}
        info = {**facts, **timing, **preview.beside}
        publish_unit(self.job.store, self.job.node, self.job.unit_key, files, Counts(count, count), info)

    def _log(self, meter: Meter, rate: float) -> None:
        means = meter.means(self.spec.global_batch_size)
        if self.ranks.rank == 0:
            step = self.position.step
            self.report.metrics({**means, "learning_rate": rate, "epoch": self._epoch()}, step)
            made = progress(self.spec, step, self.position.elapsed_s)
            note = f"loss {means['loss']:.4f}, {means['images_per_s']:.0f} images/s"
            self.report.progress(step, max(step, round(step / made)), "steps", note)

    def _preview(self) -> None:
        weights = self.engine.gather("ema")
        if weights is not None:
            with all_cores(self.job.execution.cpus):
                try:
                    preview = self.trainable.preview(weights)
                except GenerationError as error:
                    self.report.note(f"no preview at step {self.position.step}: {error}")
                else:
                    self._show(preview, self.position.step)

    def _show(self, preview: Preview, step: int | None) -> None:
        place = "final" if step is None else f"step_{step:06d}"
        for name, png in preview.figures.items():
            self.report.figure(f"{name}/{place}.png", png)
        if preview.metrics or preview.beside:
            self.report.metrics({**preview.metrics, **preview.beside}, step)

    def _due(self, every_steps: int) -> bool:
        return self.position.step % every_steps == 0

    def _epoch(self) -> float:
        return self.position.step * self.spec.global_batch_size / self.trainable.num_samples

    def _agreed(self, elapsed_s: float) -> float:
        """Rank 0's clock decides where time does, so that all ranks end at the same step."""
        return elapsed_s if self.spec.max_minutes is None else self.ranks.agreed(elapsed_s, self.engine.device)


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
