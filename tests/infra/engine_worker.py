"""One training rank for `test_engine.py`: serves calls of this module's functions over a socket, until it is closed.

Run as `engine_worker.py SOCKET`, with the environment of a launcher. Ranks live for the whole test module,
because importing DeepSpeed takes longer than all of the training here.
"""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from infra.engine import Engine, EngineSpec, NonFiniteGradients
from infra.ranks import join_process_group, objects_group

DEEPSPEED_CAME_ALONG = "deepspeed" in sys.modules
GLOBAL_BATCH_SIZE = 8
MAX_GRAD_NORM = 0.25
PERSISTENCE_THRESHOLD = 100_000  # stage 3 keeps smaller parameters whole on every rank


class Net(nn.Module):
    """Convolutions and linear layers with what is awkward to shard."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(123)
        self.frozen = nn.Conv2d(3, 5, 1).requires_grad_(False)
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(5, 8, 3, padding=1)
        self.wide = nn.Linear(128, 1024)
        assert self.wide.weight.numel() > PERSISTENCE_THRESHOLD
        self.narrow = nn.Linear(1024, 16)
        self.tied = nn.Linear(16, 16, bias=False)
        self.tied_again = nn.Linear(16, 16, bias=False)
        self.tied_again.weight = self.tied.weight
        self.unused = nn.Linear(3, 7)
        self.head = nn.Linear(16, 4)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        hidden = functional.silu(self.conv(self.frozen(x_BCHW)))
        hidden = functional.silu(self.wide(hidden.flatten(1)))
        hidden = functional.silu(self.tied_again(self.tied(self.narrow(hidden))))
        return self.head(hidden) * self.scale


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Global batch of one step: the same on any number of ranks."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(GLOBAL_BATCH_SIZE, 3, 4, 4, generator=generator)
    targets = torch.randn(GLOBAL_BATCH_SIZE, 4, generator=generator)
    return inputs.to(memory_format=torch.channels_last), targets


def learning_rate(step: int) -> float:
    return 1e-2 / (1 + step)


def ema_decay(step: int) -> float:
    return min(0.9, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Run:
    """What to train, and what to bring back."""

    stage: int
    stop: int = 4
    precision: str = "fp32"
    accumulation: int = 1
    offload: bool = False
    load: Path | None = None
    save: Path | None = None
    save_at: int = -1
    poison: tuple[int, ...] = ()
    """Steps at which the last rank's loss is not a number."""
    every_step: bool = False
    """Gather weights and average after every step, not only in the end."""
    seed: int = 0
    lr_factor: float = 1.0
    evaluate: bool = False
    """Run the module without gradients before every step."""


@dataclass
class Outcome:
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    weights: list[dict[str, Any]] = field(default_factory=list)
    ema: list[dict[str, Any]] = field(default_factory=list)
    optimizer_step: int = 0
    written: list[str] = field(default_factory=list)
    head_dtype: str = ""


def spec(run: Run) -> EngineSpec:
    return EngineSpec(
        zero_stage=run.stage,
        micro_batch_size=GLOBAL_BATCH_SIZE // dist.get_world_size() // run.accumulation,
        gradient_accumulation_steps=run.accumulation,
        precision=run.precision,
        learning_rate=1.0,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=0.01,
        max_grad_norm=MAX_GRAD_NORM,
        ema_decay=0.5,
        device="cpu",
        offload_optimizer=run.offload,
    )


def train(**options: Any) -> dict[str, Any]:
    run, outcome = Run(**options), Outcome()
    engine = Engine.build(Net(run.seed).to(memory_format=torch.channels_last), spec(run))
    engine.module.head.register_forward_hook(lambda *call: setattr(outcome, "head_dtype", str(call[-1].dtype)))
    start = engine.load(run.load)["step"] if run.load else 0
    for step in range(start, run.stop):
        if run.evaluate:
            with torch.no_grad():
                engine(batch(step)[0])
        outcome.losses.append(_accumulate(engine, run, step))
        info = engine.step(learning_rate(step) * run.lr_factor, ema_decay(step))
        outcome.grad_norms.append(info.grad_norm)
        outcome.applied.append(info.applied)
        if step + 1 == run.save_at:
            outcome.written = engine.save(run.save, {"step": step + 1})
        if run.every_step or step + 1 == run.stop:
            _collect(engine, outcome)
    outcome.optimizer_step = engine.optimizer_step
    engine.close()
    return vars(outcome)


def train_plainly(stop: int) -> dict[str, Any]:
    """What `train` should come to, with torch alone: one process, the whole batch, whole tensors."""
    network, outcome = Net(), Outcome()
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    ema = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.99), eps=1e-8, weight_decay=0.01)
    for step in range(stop):
        inputs, targets = batch(step)
        loss = functional.mse_loss(network(inputs), targets)
        loss.backward()
        outcome.losses.append(loss.item())
        outcome.grad_norms.append(nn.utils.clip_grad_norm_(parameters.values(), MAX_GRAD_NORM).item())
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        decay = ema_decay(step)
        for name, parameter in parameters.items():
            ema[name] = decay * ema[name] + (1 - decay) * parameter.detach()
    outcome.weights.append({name: parameter.detach().numpy() for name, parameter in parameters.items()})
    outcome.ema.append({name: tensor.numpy() for name, tensor in ema.items()})
    return vars(outcome)


def go_back(**options: Any) -> tuple[list[float], list[float]]:
    """Losses of a run, and of going back to a checkpoint of it in the same engine."""
    run = Run(**options)
    engine = Engine.build(Net(), spec(run))
    losses = []
    for step in range(run.stop):
        if step == run.save_at:
            engine.save(run.save, {"step": step})
        losses.append(_accumulate(engine, run, step))
        engine.step(learning_rate(step), ema_decay(step))
    again = []
    for step in range(engine.load(run.save)["step"], run.stop):
        again.append(_accumulate(engine, run, step))
        engine.step(learning_rate(step), ema_decay(step))
    engine.close()
    return losses[run.save_at :], again


def reload(**options: Any) -> dict[str, Any]:
    """Load, collect, save, and nothing else."""
    run, outcome = Run(**options), Outcome()
    engine = Engine.build(Net(seed=2), spec(run))
    position = engine.load(run.load)
    _collect(engine, outcome)
    engine.save(run.save, position)
    engine.close()
    return vars(outcome)


def _accumulate(engine: Engine, run: Run, step: int) -> float:
    inputs, targets = batch(step)
    size = engine.spec.micro_batch_size
    own = slice(engine.rank * size * run.accumulation, (engine.rank + 1) * size * run.accumulation)
    total = torch.zeros(())
    for micro_inputs, micro_targets in zip(inputs[own].split(size), targets[own].split(size), strict=True):
        outputs = engine(micro_inputs.contiguous(memory_format=torch.channels_last))
        loss = functional.mse_loss(outputs.float(), micro_targets)
        total += loss.detach() / run.accumulation / engine.world_size
        engine.backward(loss * math.nan if step in run.poison and engine.rank == engine.world_size - 1 else loss)
    dist.all_reduce(total)
    return total.item()


def _collect(engine: Engine, outcome: Outcome) -> None:
    weights, ema = engine.gather("weights"), engine.gather("ema")
    assert (weights is None) == (ema is None) == (engine.rank != 0)
    if weights is not None and ema is not None:
        outcome.weights.append({name: tensor.numpy() for name, tensor in weights.items()})
        outcome.ema.append({name: tensor.numpy() for name, tensor in ema.items()})


def deepspeed_came_along() -> bool:
    """Whether importing the engine imported DeepSpeed."""
    return DEEPSPEED_CAME_ALONG


def exchange() -> tuple[str, str, list[Any]]:
    """The backends of all ranks' group and of that for objects, and what all ranks have said over the latter."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, {"rank": dist.get_rank()}, group=objects_group())
    dist.barrier(group=objects_group())
    return dist.get_backend(), dist.get_backend(objects_group()), said


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:  # noqa: BLE001 - brought back to be looked at
        return f"{type(error).__name__}: {error}"
    return ""


def load(extra_layer: bool = False, **options: Any) -> str:
    """The error of resuming, perhaps with a network that has one layer more."""
    run, network = Run(**options), Net()
    if extra_layer:
        network.extra = nn.Linear(2, 2)
    engine = Engine.build(network, spec(run))
    error = error_of(lambda: engine.load(run.load))
    engine.close()
    return error


def refusals() -> list[str]:
    """Errors of what can't work."""
    settings = spec(Run(stage=1, accumulation=2))
    found = [
        error_of(lambda: Engine.build(Net().requires_grad_(False), settings)),
        error_of(lambda: Engine.build(Net().double(), settings)),
        error_of(lambda: Engine.build(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), settings)),
        error_of(lambda: Engine.build(Net(), replace(settings, device="cuda"))),
    ]
    engine = Engine.build(Net(), settings)
    inputs, _ = batch(0)
    engine.backward(engine(inputs).square().mean())
    found += [error_of(lambda: engine.step(0.1)), error_of(lambda: engine.save(Path("unused"), {}))]
    engine.backward(engine(inputs).square().mean())
    found.append(error_of(lambda: engine.backward(engine(inputs).square().mean())))
    engine.close()
    return found


def give_up(**options: Any) -> tuple[int, bool]:
    """Updates tried until the engine gave up, and whether the weights are as they were."""
    engine = Engine.build(Net(), spec(Run(**options)))
    before = engine.gather("ema")
    tries = 0
    try:
        while tries < 100:
            tries += 1
            engine.backward(engine(batch(0)[0]).mean() * math.inf)
            engine.step(0.1)
    except NonFiniteGradients:
        weights, ema = engine.gather("weights"), engine.gather("ema")
        same = before is None or all(
            np.array_equal(before[name], after[name]) for after in (weights, ema) for name in before
        )
        return tries, same
    finally:
        engine.close()
    return tries, False


def main() -> None:
    torch.set_num_threads(1)
    with join_process_group("cpu"), Client(sys.argv[1], "AF_UNIX") as connection:
        while True:
            try:
                name, options = connection.recv()
            except EOFError:
                break
            try:
                connection.send((True, globals()[name](**options)))
            except Exception:  # noqa: BLE001 - the test shows it
                connection.send((False, traceback.format_exc()))


if __name__ == "__main__":
    main()
