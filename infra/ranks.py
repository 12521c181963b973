"""A process among those that train together: the group it joins, the device it computes on, and how it waits.

What an accelerator's collectives (NCCL) are for is tensors, in step: a rank that comes minutes late to one ends the
training, since its watchdog takes it for dead. Whatever takes longer, or moves Python objects, goes over gloo.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Literal, cast

import torch
import torch.distributed as dist

OBJECTS_TIMEOUT_S = 4 * 3600.0
"""How long ranks wait for one that does something alone. One that dies is noticed at once."""

_objects_groups: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []


class DeviceUnavailable(Exception):
    """Training is to run on a device that this node doesn't have; the message says what it has, and what to set."""


def choose_device(wanted: Literal["cpu", "cuda", "auto"], local_rank: int, local_world_size: int) -> torch.device:
    """Device of the rank `local_rank` of the `local_world_size` on this node: one GPU each, or the CPU for all.

    "auto" takes GPUs where there are enough for all ranks of the node.
    Raises `DeviceUnavailable` if "cuda" is wanted and there are fewer GPUs than ranks.
    """
    available = torch.cuda.device_count() if wanted != "cpu" and torch.cuda.is_available() else 0
    if wanted == "cuda" and available < local_world_size:
        raise DeviceUnavailable(
            f"device is 'cuda' and {local_world_size} ranks train on this node, which has {available} GPUs that torch"
            f" {torch.__version__} can use; each rank needs one: train with fewer ranks, let each process see all GPUs"
            " of its node (CUDA_VISIBLE_DEVICES), or set the device to auto or cpu"
        )
    on_gpu = wanted != "cpu" and available >= local_world_size
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


@contextlib.contextmanager
def join_process_group(device: Literal["cpu", "cuda"]) -> Iterator[None]:
    """Joins the ranks that torchrun has started, or makes a group of this process alone, for the length of the block.

    On GPUs, tensors in their memory go over NCCL, and all else over gloo; this process's GPU is the one of its local
    rank from here on. `LOCAL_RANK` and what torchrun sets beside it are in the environment afterwards.
    """
    if "WORLD_SIZE" not in os.environ:
        numbers = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", **numbers})
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before NCCL takes the first one for all ranks
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    try:
        yield
    finally:
        _objects_groups.clear()
        dist.destroy_process_group()


def objects_group() -> dist.ProcessGroup:
    """All ranks, over gloo: for Python objects, for tensors in the host's memory, and for waiting.

    Every rank calls it first at the same point of the program. Also where the launcher has initialised NCCL alone, as
    Ray Train does.
    """
    everyone = dist.group.WORLD
    if everyone is None:
        raise ValueError("there is no process group: join one first (`join_process_group`, or Ray Train)")
    for known, objects in _objects_groups:
        if known is everyone:
            return objects
    timeout = datetime.timedelta(seconds=OBJECTS_TIMEOUT_S)
    objects = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))  # this rank is in it
    _objects_groups[:] = [(everyone, objects)]  # of an earlier one, nothing is left
    return objects
