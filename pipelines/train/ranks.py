"""This process among the others that train the same model: what its launcher has put into the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Numbers of the process group, which is initialised; `local` ones are of this node."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def current(cls) -> Ranks:
        environment = os.environ
        local_world_size = int(environment.get("LOCAL_WORLD_SIZE", "1"))
        return cls(dist.get_rank(), dist.get_world_size(), int(environment.get("LOCAL_RANK", "0")), local_world_size)

    def device(self, wanted: Literal["cpu", "cuda", "auto"]) -> torch.device:
        """The accelerator of this process where it has one and `wanted` allows it."""
        if wanted == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.local_rank % torch.cuda.device_count())

    @contextlib.contextmanager
    def threads(self, cpus: int | None) -> Iterator[None]:
        """Compute with this process's share of `cpus` cores, by default the node's."""
        with _threads((cpus or _cores()) // self.local_world_size):
            yield

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Over all ranks."""
        dist.all_reduce(values)
        return values / self.world_size

    def agreed(self, value: float, device: torch.device) -> float:
        """Rank 0's value."""
        if self.world_size == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=device)
        dist.broadcast(shared, src=0)
        return float(shared.item())


@contextlib.contextmanager
def all_cores(cpus: int | None) -> Iterator[None]:
    """Compute with `cpus` cores, by default all of the node's: while the other ranks wait."""
    with _threads(cpus or _cores()):
        yield


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cores() -> int:
    return len(os.sched_getaffinity(0))
