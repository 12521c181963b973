"""How long one step of a training takes on this machine, in each precision: forward, backward and AdamW, of one rank.

Inputs are random numbers of the shapes that the recipe asks for: no data is needed, and nothing is published.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from infra.ranks import choose_device
from pipelines.recipe import Recipe
from pipelines.train.kinds import KINDS
from pipelines.train.ranks import Ranks

PRECISIONS: tuple[Literal["fp32"], Literal["bf16"]] = ("fp32", "bf16")
ROUNDS = 11
ENOUGH_S = 20.0
"""Seconds after which no further round is begun, once there are two."""

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class StepTimes:
    """What one step takes, the median of `rounds`, by precision."""

    batch_size: int
    """Samples of one rank in one pass."""
    device: str
    threads: int
    """Threads that the rank computes with; on a GPU they hardly matter."""
    rounds: int
    seconds: dict[str, float]

    @property
    def gain(self) -> float:
        """How many times as fast bf16 is."""
        return self.seconds["fp32"] / self.seconds["bf16"]


def time_steps(recipe: Recipe, name: str) -> StepTimes:
    """Times of a step of the model `name` of a recipe that has been checked, on the device and with the threads that a
    rank would have.

    Raises `ldm.errors.LdmError` if the text encoder or pretrained weights can't be loaded, and
    `infra.ranks.DeviceUnavailable`.
    """
    execution, train = recipe.execution, recipe.models[name].train
    ranks = Ranks(0, execution.ranks, 0, execution.ranks)
    device = choose_device(execution.device, 0, execution.ranks)
    batch_size = execution.micro_batch_size or train.global_batch_size // execution.ranks
    with ranks.threads(execution.cpus):
        size = min(batch_size, train.global_batch_size // execution.ranks)
        module, forward = KINDS[recipe.models[name].kind].timed_step(recipe, recipe.model(name), size, device)
        times = _timed(module.train(), forward, device)
        return StepTimes(
            batch_size=batch_size,
            device=str(device),
            threads=torch.get_num_threads(),
            rounds=len(times["fp32"]),
            seconds={precision: statistics.median(found) for precision, found in times.items()},
        )


def _timed(module: nn.Module, forward: Forward, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each round by precision, in turn; one of each goes before and isn't counted."""
    optimizer = torch.optim.AdamW([each for each in module.parameters() if each.requires_grad], fused=True)

    def step(precision: str) -> float:
        optimizer.zero_grad(set_to_none=True)
        _finish(device)
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = forward()
        loss = output.float().square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        _finish(device)
        return time.perf_counter() - began

    for precision in PRECISIONS:
        step(precision)
    times: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    began = time.perf_counter()
    for number in range(ROUNDS):
        if number >= 2 and time.perf_counter() - began > ENOUGH_S:
            break
        for precision in PRECISIONS if number % 2 else PRECISIONS[::-1]:
            times[precision].append(step(precision))
    return times


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
