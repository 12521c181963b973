"""Pools of Ray actors that each hold a model: how many there can be, where they compute, and whose error is told.

How calls are spread over the actors is `infra.tasks`'s matter.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import ray

from infra.cluster import ClusterError
from infra.tasks import map_actors
from pipelines.artifacts import Unit
from pipelines.building import Build
from pipelines.reporting import Report

logger = logging.getLogger(__name__)

RESTARTS = 2


class Pool:
    """Workers, each started when it is first needed. An error that a worker's method raised is raised here, as it was
    raised there."""

    def __init__(self, start: Callable[[], Any], count: int) -> None:
        """`start` gives one more actor; there are `count` of them at most."""
        self._start = start
        self._count = count
        self._actors: list[Any] = []

    def call(self, method: str, *arguments: object) -> Any:
        """What the method of the first worker returns."""
        try:
            return ray.get(getattr(self._started(1)[0], method).remote(*arguments))
        except ray.exceptions.RayTaskError as error:
            raise cause_of(error) from error

    def map(self, method: str, items: Sequence[Any]) -> Iterator[Any]:
        """What the method returns for each item, in the order in which they get done."""
        for outcome in map_actors(self._started(len(items)), method, items) if items else ():
            if outcome.error is not None:
                raise cause_of(outcome.error) from outcome.error
            yield outcome.value

    def close(self) -> None:
        """End them."""
        for actor in self._actors:
            ray.kill(actor)

    def _started(self, count: int) -> list[Any]:
        while len(self._actors) < min(count, self._count):
            self._actors.append(self._start())
        return self._actors[:count]


class UnitsTask(Protocol):
    """Units to be made by a worker in one go."""

    @property
    def unit_keys(self) -> Sequence[str]: ...

    @property
    def num_images(self) -> int:
        """Images that are looked at for them."""


def make_units(
    build: Build, tasks: Sequence[UnitsTask], pool: Pool, method: str, report: Report, *, total: int
) -> dict[str, Unit]:
    """The units of the tasks by key: the workers' `method` publishes those of a task, and returns them.

    `total` images are what the whole artifact is of; those that no task looks at are done already.
    """
    images = {task.unit_keys[0]: task.num_images for task in tasks}
    units: dict[str, Unit] = {}
    before = total - sum(images.values())
    done, started_s = before, time.monotonic()
    report.progress(done, total, "images")
    for made in pool.map(method, tasks):
        units |= {unit.key: unit for unit in made}
        done += images[made[0].key]
        images_per_s = (done - before) / (time.monotonic() - started_s)
        report.progress(done, total, "images", f"{images_per_s:.0f} images/s")
    if done > before:
        report.metrics({"images_per_s": (done - before) / (time.monotonic() - started_s)})
    logger.info("%s: %d units made now", build.stage, len(units))
    return units


@contextmanager
def actor_pool(worker: Callable[[Any, str, int], object], job: object, *, workers: int, device: str) -> Iterator[Pool]:
    """Actors made of `worker(job, device, threads)`, for the length of the block; Ray must be initialised.

    There are up to `workers` of them, or as many as the cluster has CPUs (GPUs, if they compute there) for. An actor
    that dies is started anew twice. `device` "auto" takes GPUs if there are any; `threads` is each one's share of the
    CPUs.

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
    pool = Pool(lambda: remote.remote(job, "cuda" if on_gpu else "cpu", threads), count)
    try:
        yield pool
    finally:
        pool.close()


def cause_of(error: BaseException) -> BaseException:
    """The exception inside Ray's, which would say the same with a remote traceback in its message."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


Item = TypeVar("Item")


def batched(items: Iterable[Item], size: int) -> Iterator[tuple[Item, ...]]:
    """Batches, as `itertools.batched` of Python 3.12."""
    iterator = iter(items)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch
