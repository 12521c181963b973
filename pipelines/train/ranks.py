"""This process among the others that train the same model: what its launcher has put into the environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist

from infra.ranks import choose_device, objects_group

Value = TypeVar("Value")


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
        """The accelerator of this process where it has one and `wanted` allows it.

        Raises `infra.ranks.DeviceUnavailable`.
        """
        return choose_device(wanted, self.local_rank, self.local_world_size)

    @contextlib.contextmanager
    def threads(self, cpus: int | None) -> Iterator[None]:
        """Compute with this process's share of `cpus` cores, by default the node's."""
        with _threads((cpus or _cores()) // self.local_world_size):
            yield

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over all ranks."""
        dist.all_reduce(values)
        return values / self.world_size

    def agreed(self, value: float) -> float:
        """Rank 0's value."""
        shared = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(shared, src=0, group=objects_group())
        return float(shared.item())

    def shared(self, value: Value) -> Value:
        """Rank 0's value, of any kind that can be pickled."""
        shared: list[Any] = [value]
        dist.broadcast_object_list(shared, group=objects_group())
        found: Value = shared[0]
        return found

    def wait(self) -> None:
        """Until all ranks are here, however long rank 0 takes for what it does alone."""
        dist.barrier(group=objects_group())


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
