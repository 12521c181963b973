"""ZeRO training with DeepSpeed: forward, backward, step, a sharded moving average, and a state that moves.

The only module that imports DeepSpeed. The average is taken of the fp32 weights and is sharded as they are. `save` and
`load` go by parameter name, so that a run resumes on another number of ranks or another ZeRO stage. Learning rate,
warm-up of the average, data and checkpoint policy are the caller's; where checkpoints live is `infra.checkpoints`'.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from infra.partitions import FlatPartition, ParameterPartition, Partition
from infra.ranks import objects_group
from infra.shards import KINDS, Fragment, Kind, StateMismatch, read_shards, shard_name, write_shard

log = logging.getLogger(__name__)

STATE_NAME = "state.json"
STATE_FORMAT = 1
MAX_CONSECUTIVE_SKIPS = 10
BUCKET_ELEMENTS = 50_000_000  # of one collective call: 200 MB in fp32


class EngineError(Exception):
    """Training can't start or go on; the message says what to change."""


class NonFiniteGradients(EngineError):
    """Gradients were infinite or NaN too many times in a row."""


@dataclass(frozen=True)
class EngineSpec:
    """How a module is trained. Everything that DeepSpeed is told is derived from this."""

    zero_stage: Literal[1, 2, 3]
    """What is sharded: 1 optimizer state, 2 gradients too, 3 weights too. The lowest that fits is the fastest."""
    micro_batch_size: int
    """Samples of one rank in one forward pass."""
    gradient_accumulation_steps: int
    """Calls of `backward` to one of `step`."""
    precision: Literal["fp32", "bf16"]
    """bf16: the forward pass runs under autocast, which a module may leave out where it is slower. Weights, gradients,
    moments and average are fp32 in both."""
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float
    """Gradients are scaled down to this L2 norm; 0 leaves them as they are."""
    ema_decay: float
    """Decay of the moving average, where `step` is given no other."""
    device: Literal["cpu", "cuda"]
    offload_optimizer: bool = False
    """Keep fp32 weights and moments in the host's memory."""


@dataclass(frozen=True)
class StepInfo:
    """What an update did."""

    grad_norm: float
    """L2 norm over all ranks before clipping; infinite if the gradients were not finite."""
    applied: bool
    """False if the update was skipped because gradients were not finite; the average is left alone then."""


@dataclass(frozen=True)
class _Trainable:
    """The parameters that are trained: a tied one is here once, under the first of its names."""

    parameters: dict[str, torch.nn.Parameter]
    shapes: dict[str, tuple[int, ...]]
    names: dict[str, str]
    """Every name in the state dict, to the first name of the same parameter."""

    @classmethod
    def of(cls, module: torch.nn.Module) -> _Trainable:
        parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        first_names = {id(parameter): name for name, parameter in parameters.items()}
        return cls(
            parameters=parameters,
            shapes={name: tuple(parameter.shape) for name, parameter in parameters.items()},
            names={
                name: first_names[id(parameter)]
                for name, parameter in module.named_parameters(remove_duplicate=False)
                if id(parameter) in first_names
            },
        )


class Engine:
    """A module trained by all ranks of the process group: every rank makes the same calls in the same order."""

    def __init__(self, deepspeed_engine: Any, partition: Partition, trainable: _Trainable, spec: EngineSpec) -> None:
        """Use `build`."""
        self.spec = spec
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.device: torch.device = deepspeed_engine.device
        self._deepspeed = deepspeed_engine
        self._partition = partition
        self._trainable = trainable
        self._fragments: dict[str, Fragment] = partition.fragments()
        self._state: dict[Kind, dict[str, torch.Tensor]] = {
            kind: partition.views(kind) for kind in KINDS if kind != "ema"
        }
        self._state["ema"] = {name: view.clone() for name, view in self._state["weight"].items()}
        self._pending_backwards = 0
        self._consecutive_skips = 0

    @classmethod
    def build(cls, module: torch.nn.Module, spec: EngineSpec) -> Engine:
        """Shard the trainable parameters of `module` over the process group that the launcher has initialised.

        Rank 0's weights are the initial ones. The module is changed in place: moved to the device, its parameters made
        contiguous and part of larger tensors. A parameter without a gradient counts as one with a gradient of zero, so
        weight decay acts on it.
        Raises `EngineError` if there is no process group, nothing to train, parameters are not fp32, or a layer keeps
        running statistics.
        """
        _check(module)
        objects_group()  # is made by all ranks at one time
        # DeepSpeed's first broadcast needs plain strides, which weights in channels_last don't have (inputs may well be
        # in that format). A clone, since `contiguous` takes the odd strides of a 1x1 convolution for plain ones.
        for parameter in module.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        trainable = _Trainable.of(module)
        deepspeed_engine, optimizer, *_ = _import_deepspeed(spec.device).initialize(
            model=module,
            model_parameters=list(trainable.parameters.values()),
            config=_deepspeed_config(spec, num_elements=sum(map(math.prod, trainable.shapes.values()))),
            dist_init_required=False,
        )
        partition_class = ParameterPartition if spec.zero_stage == 3 else FlatPartition
        return cls(deepspeed_engine, partition_class(optimizer, trainable.parameters), trainable, spec)

    @property
    def module(self) -> torch.nn.Module:
        """The module itself. Call the engine to run it: only then are stage 3's weights there, and autocast on."""
        module: torch.nn.Module = self._deepspeed.module
        return module

    @property
    def optimizer_step(self) -> int:
        """Updates applied since the first, also before a resume; skipped ones don't count."""
        return self._partition.optimizer_step()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's forward pass, in `spec.precision`. Compute the loss from it in fp32."""
        return self._deepspeed(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`, the scalar mean over one rank's micro-batch; the mean over all is taken here."""
        if self._pending_backwards == self.spec.gradient_accumulation_steps:
            raise EngineError(f"backward was called {self._pending_backwards + 1} times without a step")
        self._deepspeed.backward(loss)
        self._pending_backwards += 1
        if self._pending_backwards < self.spec.gradient_accumulation_steps:
            self._deepspeed.step()  # not at a boundary: counts the micro-batch and updates nothing

    def step(self, learning_rate: float, ema_decay: float | None = None) -> StepInfo:
        """One update of the weights, then of the average: ema = decay · ema + (1 - decay) · weights.

        Non-finite gradients on any rank skip the update on all.
        Raises `NonFiniteGradients` at the tenth skip in a row; `EngineError` after too few calls of `backward`.
        """
        needed, had = self.spec.gradient_accumulation_steps, self._pending_backwards
        if had < needed:
            raise EngineError(f"step needs {needed} calls of backward (gradient_accumulation_steps) and had {had}")
        self._pending_backwards = 0
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = learning_rate
        self._deepspeed.step()
        if not self._deepspeed.was_step_applied():
            self._count_skip()
            return StepInfo(grad_norm=math.inf, applied=False)
        self._consecutive_skips = 0
        self._update_average(self.spec.ema_decay if ema_decay is None else ema_decay)
        return StepInfo(grad_norm=float(self._deepspeed.get_global_grad_norm()), applied=True)

    def gather(self, kind: Literal["ema", "weights"]) -> dict[str, torch.Tensor] | None:
        """The average or the weights of all trainable parameters by name, whole, fp32, in rank 0's host memory.

        None on the other ranks, which take part, one parameter at a time. Names are the state dict's; tied parameters
        are one tensor under several names. Frozen parameters and buffers are not in it, nor in what `save` writes.
        """
        pieces = self._state["ema" if kind == "ema" else "weight"]
        gathered = {}
        for name, shape in self._trainable.shapes.items():
            fragment = self._fragments[name]
            whole = torch.zeros(math.prod(shape), dtype=torch.float32, device=self.device)
            whole.narrow(0, fragment.start, fragment.length).copy_(pieces[name])
            # Summed as integers: all but one rank add zero bits, so that every value arrives as it is, -0.0 too.
            dist.reduce(whole.view(torch.int32), dst=0)
            if self.rank == 0:
                gathered[name] = whole.view(shape).cpu()
        if self.rank != 0:
            return None
        return {name: gathered[first_name] for name, first_name in self._trainable.names.items()}

    def save(self, folder: Path, position: Mapping[str, Any]) -> list[str]:
        """Write this rank's shard into `folder`, and rank 0 `state.json` with `position`: what the caller resumes by.

        `position` must be JSON. Call between steps. Returns the names of the files that this rank wrote, when all
        ranks have written theirs.
        """
        if self._pending_backwards:
            raise EngineError("save was called between backward and step: gradients are in no checkpoint; step first")
        folder.mkdir(parents=True, exist_ok=True)
        written = [shard_name(self.rank)]
        write_shard(folder / written[0], self._fragments, self._state)
        if self.rank == 0:
            state = {
                "format": STATE_FORMAT,
                "world_size": self.world_size,
                "zero_stage": self.spec.zero_stage,
                "precision": self.spec.precision,
                "optimizer_step": self.optimizer_step,
                "parameters": self._trainable.shapes,
                "position": dict(position),
            }
            (folder / STATE_NAME).write_text(json.dumps(state, indent=1))
            written.append(STATE_NAME)
        dist.barrier(group=objects_group())
        return written

    def load(self, folder: Path) -> dict[str, Any]:
        """Take over weights, moments, average and step count from what any engine saved; returns its `position`.

        World size, ZeRO stage and precision may differ. With the same ones, training goes on bit for bit.
        Raises `StateMismatch` if the saved parameters are others, or shards are missing.
        """
        state = json.loads((folder / STATE_NAME).read_text())
        if state["format"] != STATE_FORMAT:
            raise StateMismatch(
                f"{folder / STATE_NAME} has format {state['format']}; this version reads {STATE_FORMAT}"
            )
        self._check_parameters({name: tuple(shape) for name, shape in state["parameters"].items()})
        # With the same layout, a rank's own shard has all that it needs.
        ranks = sorted(range(state["world_size"]), key=lambda rank: rank != self.rank)
        with torch.no_grad():
            read_shards([folder / shard_name(rank) for rank in ranks], self._fragments, self._state)
        self._partition.set_optimizer_step(state["optimizer_step"])
        self._partition.refresh_weights()
        position: dict[str, Any] = state["position"]
        return position

    def close(self) -> None:
        """Free what DeepSpeed holds: its hooks and buffers. The module can't be used afterwards."""
        self._deepspeed.destroy()

    # -- inside ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _update_average(self, decay: float) -> None:
        owned = [name for name, fragment in self._fragments.items() if fragment.length]
        if owned:
            average = [self._state["ema"][name] for name in owned]
            torch._foreach_lerp_(average, [self._state["weight"][name] for name in owned], 1.0 - decay)

    def _count_skip(self) -> None:
        self._consecutive_skips += 1
        log.warning("update skipped: gradients are not finite (%d in a row)", self._consecutive_skips)
        if self._consecutive_skips >= MAX_CONSECUTIVE_SKIPS:
            raise NonFiniteGradients(
                f"gradients were not finite in {self._consecutive_skips} updates in a row; weights and average are as"
                " before them. Lower the learning rate, or look for non-finite values in the data"
            )

    def _check_parameters(self, saved: dict[str, tuple[int, ...]]) -> None:
        own = self._trainable.shapes
        for name in sorted(own.keys() | saved.keys()):
            if own.get(name) != saved.get(name):
                raise StateMismatch(
                    f"parameter {name!r} is {_describe(saved.get(name))} in the saved state and"
                    f" {_describe(own.get(name))} in the module; resume with the network that was saved"
                )


def _describe(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {list(shape)}"


def _check(module: torch.nn.Module) -> None:
    if not dist.is_initialized():
        raise EngineError("there is no process group: start with Ray Train or torchrun, or initialise one first")
    if "LOCAL_RANK" not in os.environ:
        raise EngineError("LOCAL_RANK is not in the environment: start with Ray Train or torchrun, or set it")
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise EngineError("the module has no parameter that requires a gradient: nothing to train")
    for name, part in module.named_modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.track_running_stats and part.training:
            raise EngineError(
                f"{name!r} keeps running statistics, which differ between ranks and are in no checkpoint:"
                " use group normalisation, or freeze it in evaluation mode"
            )
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:
            raise EngineError(f"parameter {name!r} has no dimension: DeepSpeed can't broadcast it, give it shape [1]")
        if parameter.dtype != torch.float32:
            raise EngineError(
                f"parameter {name!r} is {parameter.dtype}; give the module in fp32, `precision` does the rest"
            )


def _import_deepspeed(device: str) -> Any:
    """DeepSpeed for this device, its messages with everyone else's, its compiled collectives off."""
    os.environ.setdefault("DS_ACCELERATOR", device)  # read at the first import; it would guess otherwise, aloud
    with _left_out("mlflow"):  # its tuner's, unused here: most of the seconds that the import takes
        import deepspeed
        from deepspeed.accelerator import get_accelerator

    chosen = get_accelerator().device_name()
    if chosen != device:
        raise EngineError(
            f"DeepSpeed was set to {chosen!r} in this process (DS_ACCELERATOR), but training is to run on {device!r}:"
            " start a new process, without that variable"
        )
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()  # it writes to standard output
    logger.propagate = True
    # Its shared-memory collectives are compiled on first use (45 s, and a killed compilation leaves a lock behind on
    # which the next run waits) and were slower than gloo where ranks share cores: they wait by spinning.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It would import torch's compiler for Muon, an optimizer that isn't used here: a second of CPU on each rank.
    deepspeed.runtime.compiler.compile = lambda: lambda function: function
    # DeepSpeed 0.19 calls collectives by their former names, and torch says so at each call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


@contextlib.contextmanager
def _left_out(module: str) -> Iterator[None]:
    """`import module` fails in the block, unless it was imported before."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment] # Python's own sign for that
    try:
        yield
    finally:
        del sys.modules[module]


def _deepspeed_config(spec: EngineSpec, num_elements: int) -> dict[str, Any]:
    bucket = min(BUCKET_ELEMENTS, num_elements + num_elements % 2)  # must be even
    zero: dict[str, Any] = {"stage": spec.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if spec.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": spec.device == "cuda"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": spec.micro_batch_size,
        "gradient_accumulation_steps": spec.gradient_accumulation_steps,
        "gradient_clipping": spec.max_grad_norm,
        "zero_optimization": zero,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "torch_adam": True,  # DeepSpeed's own is compiled on first use
                "fused": True,
                "lr": spec.learning_rate,
                "betas": list(spec.betas),
                "eps": spec.eps,
                "weight_decay": spec.weight_decay,
            },
        },
    }
    if spec.precision == "bf16":
        # No module is listed as safe for low-precision communication: gradients are averaged in fp32.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config
