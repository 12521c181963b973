"""One training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infra.engine import Engine
from pipelines.train.order import Sample
from pipelines.train.trainable import Trainable


@dataclass(frozen=True)
class StepResult:
    """Result of this rank's share of the global batch: mean loss and its parts. The gradient's norm is of the whole."""

    losses: Mapping[str, Tensor]
    grad_norm: float
    applied: bool


def train_step(
    engine: Engine, trainable: Trainable, samples: Sequence[Sample], learning_rate: float, ema_decay: float
) -> StepResult:
    """Forward and backward for each micro-batch of this rank's samples, then one update of weights and average."""
    losses: list[Mapping[str, Tensor]] = []
    for first in range(0, len(samples), engine.spec.micro_batch_size):
        batch = trainable.batch(samples[first : first + engine.spec.micro_batch_size])
        on_device = {name: values.to(engine.device, non_blocking=True) for name, values in batch.items()}
        loss, parts = trainable.loss(engine, on_device)
        engine.backward(loss)
        losses.append({"loss": loss.detach(), **{f"loss/{name}": value for name, value in parts.items()}})
    info = engine.step(learning_rate, ema_decay)
    means = {name: torch.stack([one[name] for one in losses]).mean() for name in losses[0]}
    return StepResult(means, info.grad_norm, info.applied)
