"""Training processes under Ray Train: started, watched, and started again from the last checkpoint if one dies.

Ray Train makes the process group; `loop.train_worker`, which knows no Ray, does the rest. What rank 0 reports travels
through a small actor to the driver.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import fsspec
import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig

from infra.engine import EngineError
from infra.storage import StoreUnwritable
from ldm.errors import LdmError
from pipelines.artifacts import ArtifactError
from pipelines.dataset.errors import DatasetError
from pipelines.reporting import Event, QueuedReport, Report
from pipelines.train.errors import TrainError, WorkerFailed
from pipelines.train.job import TrainJob

MAX_RESTARTS = 2
POLL_INTERVAL_S = 0.25
PERMANENT_ERRORS = (TrainError, DatasetError, LdmError, EngineError, ArtifactError, StoreUnwritable)
"""Errors that the next attempt would meet again."""


class _Relay:
    """An actor between rank 0 and the driver: keeps events until they are fetched, and the error that ends it all."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._error: Exception | None = None

    def push(self, event: Event) -> None:
        self._events.append(event)

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def fail(self, error: Exception) -> None:
        self._error = self._error or error

    def error(self) -> Exception | None:
        return self._error


def launch(job: TrainJob, report: Report) -> None:
    """Train `job` on `execution.ranks` processes of the cluster that this process has joined.

    Raises:
        TrainError, DatasetError, LdmError, EngineError, ArtifactError, StoreUnwritable: a process raised it, and would
            again.
        WorkerFailed: a process died or raised something else, more than `MAX_RESTARTS` times.
    """
    relay = ray.remote(num_cpus=0)(_Relay).remote()
    # Ray Train replaces the handler of SIGINT where it is called in the main thread, and Ctrl-C is the workflow's.
    executor = ThreadPoolExecutor(1, thread_name_prefix=f"ray train of {job.name}")
    fit = executor.submit(_trainer(job, relay).fit)
    executor.shutdown(wait=False)
    while not wait([fit], POLL_INTERVAL_S).done:
        _forward(relay, report)
    _forward(relay, report)
    try:
        fit.result()
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        raise ray.get(relay.error.remote()) or _worker_failed(job, error) from error


def _trainer(job: TrainJob, relay: Any) -> TorchTrainer:
    resources = ray.cluster_resources()
    use_gpu = job.execution.device != "cpu" and resources.get("GPU", 0) >= job.execution.ranks
    # Ray Train wants a folder that all nodes see, though nothing is reported to it: the checkpoints are ours.
    filesystem, folder = fsspec.core.url_to_fs(job.store.location(f"{job.work}/ray"))
    # Otherwise each rank works in a folder of its own, and a recipe's relative paths mean nothing there.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    return TorchTrainer(
        _run_rank,
        train_loop_config={"job": job, "relay": relay},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.execution.ranks,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": _cpus_each(job, resources), **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=f"{job.node}-{uuid.uuid4().hex[:8]}",  # nothing of an earlier run is to be picked up
            storage_path=folder,
            storage_filesystem=PyFileSystem(FSSpecHandler(filesystem)),
            failure_config=FailureConfig(max_failures=MAX_RESTARTS),
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _cpus_each(job: TrainJob, resources: Mapping[str, float]) -> float:
    """What a rank asks Ray for: one CPU, or its share of a local machine that has fewer: it would wait for ever."""
    if job.execution.cluster != "local":
        return 1.0
    return min(1.0, resources.get("CPU", 1.0) / job.execution.ranks)


def _run_rank(config: dict[str, Any]) -> None:
    relay = config["relay"]
    earlier = ray.get(relay.error.remote())
    if earlier is not None:
        raise earlier
    from pipelines.train.loop import train_worker

    try:
        train_worker(config["job"], QueuedReport(relay.push.remote))
    except PERMANENT_ERRORS as error:
        ray.get(relay.fail.remote(error))
        raise
    ray.get(relay.error.remote())  # calls are in order: what was pushed before has arrived


def _forward(relay: Any, report: Report) -> None:
    for event in ray.get(relay.drain.remote()):
        event.apply(report)


def _worker_failed(job: TrainJob, error: Exception) -> WorkerFailed:
    causes = getattr(error, "worker_failures", None) or {0: error}
    rank, cause = min(causes.items())
    first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return WorkerFailed(
        f"training {job.name} failed {MAX_RESTARTS + 1} times; the last time rank {rank} ended with"
        f" {type(cause).__name__}: {first_line}. The log has the rest; run the same command again to go on from the"
        " last checkpoint"
    )
