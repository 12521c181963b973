"""How a model is trained: steps, batches, optimizer, average. The same block for all kinds of model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipelines.recipe.block import Block, Count, NonNegativeFloat, PositiveFloat, Whole


class Optimizer(Block):
    """AdamW with linear warm-up and a cosine or constant course."""

    learning_rate: PositiveFloat = 1e-4
    """Learning rate of AdamW after the warm-up."""
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.99)
    """Decay rates of AdamW's moving averages, of the gradient and of its square, each from 0 to below 1."""
    eps: PositiveFloat = 1e-8
    """Number that is added to AdamW's denominator, so that it is never 0."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay of AdamW, decoupled from the gradient; 0 leaves it out."""
    warmup_steps: Whole = 100
    """Number of steps in which the learning rate rises linearly from 0; with 0 steps there is no warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate. constant keeps it after the warm-up; cosine multiplies it by half a cosine, from 1
    at the beginning of training to 0 at its end."""
    max_grad_norm: PositiveFloat = 1.0
    """Greatest L2 norm of the gradient over all parameters; a longer gradient is scaled down to it."""


class TrainSpec(Block):
    """How a model is trained. What runs it (ranks, ZeRO stage, micro-batch) is in `execution`."""

    steps: Count
    """Number of optimizer steps, each of one global batch."""
    max_minutes: PositiveFloat | None = None
    """Minutes of training, in all, after which it ends though `steps` are not made. The course of the learning rate
    follows whichever of steps and minutes is further on, and how many steps are made depends on the machine. null sets
    no limit."""
    global_batch_size: Count = 32
    """Number of samples of one optimizer step, over all ranks; `lanes` and `execution.ranks` must divide it."""
    lanes: Count = 8
    """Number of parts of the dataset from each of which a global batch takes an equal share; it must divide
    `global_batch_size`."""
    optimizer: Optimizer = Optimizer()
    """Settings of AdamW and the course of its learning rate."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9999
    """Decay of the weights' moving average, which is what is published. It warms up:
    min(ema_decay, (1 + step) / (10 + step))."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of forward and backward passes; `ldm doctor` says which is faster here. Weights, gradients, moments and
    average are fp32 in both."""
    seed: Whole = 0
    """Seed of the initial weights, of the order of samples, and of all noise in training."""
