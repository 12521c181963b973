"""How far training is, and the learning rate there: pure functions of steps made and minutes spent."""

from __future__ import annotations

import math

from pipelines.recipe import Optimizer, TrainSpec


def progress(spec: TrainSpec, step: int, elapsed_s: float) -> float:
    """Progress in [0, 1], after `step` steps and `elapsed_s`: by steps or by minutes, whichever is further on. 1 is the
    end."""
    return min(1.0, max(step / spec.steps, by_minutes(spec, elapsed_s)))


def by_minutes(spec: TrainSpec, elapsed_s: float) -> float:
    """How far training is by minutes alone: 1 and above is the end; 0 where they are not limited."""
    return elapsed_s / 60 / spec.max_minutes if spec.max_minutes is not None else 0.0


def learning_rate(optimizer: Optimizer, step: int, progress_made: float) -> float:
    """Learning rate of the step that follows `step` others: linear warm-up, times a half cosine from 1 to 0 or a
    constant."""
    warmup = min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
    course = (1 + math.cos(math.pi * progress_made)) / 2 if optimizer.schedule == "cosine" else 1.0
    return optimizer.learning_rate * warmup * course
