"""Pools of Ray actors that each hold a model: how many there can be, where they compute, and whose error is told.

How calls are spread over the actors is `infra.cluster`'s matter.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import ray

from infra.cluster import ClusterError, map_actors
from pipelines.artifacts import Unit
from pipelines.building import Build
from pipelines.reporting import Report

logger = logging.getLogger(__name__)

RESTARTS = 2


class Pool:
    """Running workers. An error that a worker's method raised is raised here, as it was raised there."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors

    def call(self, method: str, *arguments: object) -> Any:
        """What the method of the first worker returns."""
        try:
            return ray.get(getattr(self._actors[0], method).remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from error

    def map(self, method: str, items: Iterable[Any]) -> Iterator[Any]:
        """What the method returns for each item, in the order in which they get done."""
        for outcome in map_actors(self._actors, method, items):
            if outcome.error is not None:
                raise cause_of(outcome.error) from outcome.error
            yield outcome.value


class UnitTask(Protocol):
    """A unit to be made by a worker."""

    @property
    def unit_key(self) -> str: ...

    @property
    def num_images(self) -> int: ...


def make_units(build: Build, tasks: Sequence[UnitTask], pool: Pool, method: str, report: Report) -> list[Unit]:
    """The units of the tasks, in their order, by the workers' `method`, which publishes a task's unit and returns it;
    those that are published already are taken as they are."""
    units = {task.unit_key: unit for task in tasks if (unit := build.find_unit(task.unit_key)) is not None}
    missing = [task for task in tasks if task.unit_key not in units]
    total = sum(task.num_images for task in tasks)
    before = total - sum(task.num_images for task in missing)
    done, started_s = before, time.monotonic()
    report.progress(done, total, "images")
    for unit in pool.map(method, missing):
        units[unit.key] = unit
        done += unit.counts.kept
        images_per_s = (done - before) / (time.monotonic() - started_s)
        report.progress(done, total, "images", f"{images_per_s:.0f} images/s")
    if done > before:
        report.metrics({"images_per_s": (done - before) / (time.monotonic() - started_s)})
    logger.info("%s: %d of %d shards made now", build.stage, len(missing), len(tasks))
    return [units[task.unit_key] for task in tasks]


@contextmanager
def actor_pool(worker: Callable[[Any, str, int], object], job: object, *, workers: int, device: str) -> Iterator[Pool]:
    """Actors made of `worker(job, device, threads)`, for the length of the block; Ray must be initialised.

    There are `workers` of them, or as many as the cluster has CPUs (GPUs, if they compute there) for. An actor that
    dies is started anew twice. `device` "auto" takes GPUs if there are any; `threads` is each one's share of the CPUs.

    Raises `ClusterError` if `device` is "cuda" and there is no GPU.
    """
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if device == "cuda" and not gpus:
        raise ClusterError("execution.device is cuda, but the cluster has no GPU; set it to auto or cpu")
    on_gpu = device != "cpu" and gpus > 0
    count = max(1, min(workers, gpus if on_gpu else cpus))
    # One CPU each, whatever they use: a pool that asks for more than a node has would wait for it for ever.
    options = {"num_cpus": 1, "num_gpus": int(on_gpu), "max_restarts": RESTARTS, "max_task_retries": RESTARTS}
    remote = ray.remote(**options)(worker)
    threads = max(1, cpus // count)
    actors = [remote.remote(job, "cuda" if on_gpu else "cpu", threads) for _ in range(count)]
    try:
        yield Pool(actors)
    finally:
        for actor in actors:
            ray.kill(actor)


def cause_of(error: BaseException) -> BaseException:
    """The exception inside Ray's, which would say the same with a remote traceback in its message."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    """As `itertools.batched` of Python 3.12."""
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch
