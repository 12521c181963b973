"""Training processes under Ray Train: started, watched, and started again from the last checkpoint if one dies.

Ray Train makes the process group; `loop.train_worker`, which knows no Ray, does the rest. What rank 0 reports travels
through a small actor to the driver. Only what may go better the next time is tried again.
"""

from __future__ import annotations

import logging
import os
import pickle
import threading
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

import fsspec
import ray
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import LoggingConfig

from infra.engine import EngineError
from infra.ranks import DeviceUnavailable
from infra.shards import StateMismatch
from infra.signals import interruptible
from infra.storage import FileDamaged, StoreUnwritable
from infra.trainer import LocalTorchTrainer
from ldm.errors import LdmError
from pipelines.errors import LatentworksError
from pipelines.reporting import Event, QueuedReport, Report
from pipelines.train.errors import TrainError, WorkerFailed
from pipelines.train.job import TrainJob

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
POLL_INTERVAL_S = 0.25
PERMANENT_ERRORS = (
    LatentworksError,
    LdmError,
    EngineError,
    StateMismatch,
    StoreUnwritable,
    FileDamaged,
    DeviceUnavailable,
)
"""Errors that the next attempt would meet again: those that say what to do about them."""

logger = logging.getLogger(__name__)


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
        DeviceUnavailable: the recipe asks for accelerators that the cluster hasn't.
        LatentworksError, LdmError, EngineError, StateMismatch, StoreUnwritable, FileDamaged: a process raised it, and
            would again.
        WorkerFailed: a process died or raised something else, `MAX_ATTEMPTS` times.
    """
    device = choose_device(job, ray.cluster_resources(), report)
    job = replace(job, execution=job.execution.model_copy(update={"device": device}))
    for attempt in range(1, MAX_ATTEMPTS + 1):
        report.progress(0, job.execution.ranks, "ranks", "starting")
        failure = _attempt(job, report)
        if failure is None:
            return
        what = describe_failure(failure)
        if attempt < MAX_ATTEMPTS:
            report.note(
                f"{job.node}: {what}; it goes on from the last checkpoint, attempt {attempt + 1} of {MAX_ATTEMPTS}"
            )
    raise WorkerFailed(
        f"training {job.name} failed {MAX_ATTEMPTS} times; the last time {what}. The log has the rest; run the same"
        " command again to go on from the last checkpoint"
    ) from failure


def choose_device(job: TrainJob, resources: Mapping[str, float], report: Report) -> str:
    """ "cuda" or "cpu", for a cluster with these resources. Raises `DeviceUnavailable`."""
    execution, gpus = job.execution, int(resources.get("GPU", 0))
    if execution.device == "cpu" or (execution.device == "auto" and not gpus):
        return "cpu"
    if gpus >= execution.ranks:
        return "cuda"
    few = f"the cluster has {gpus} GPUs, and each of the {execution.ranks} ranks takes one"
    if execution.device == "cuda":
        remedy = f"set execution.ranks to {gpus} or fewer, or " if gpus else "set "
        raise DeviceUnavailable(f"execution.device is cuda, but {few}; {remedy}execution.device to auto or cpu")
    report.note(f"{job.node} trains on the CPU: {few}; set execution.ranks to {gpus} to use them")
    return "cpu"


def describe_failure(error: BaseException) -> str:
    """Which rank ended with what, in a line. Of several the one that died: the others miss it."""
    causes: dict[int, BaseException] = dict(getattr(error, "worker_failures", None) or {})
    if not causes:
        return f"it ended with {_first_line(error)}"
    deaths = {rank: cause for rank, cause in causes.items() if isinstance(_inner(cause), ray.exceptions.RayActorError)}
    rank, cause = min((deaths or causes).items(), key=lambda one: one[0])
    if deaths:
        return f"rank {rank} died: its process ended without a word, or was killed"
    return f"rank {rank} ended with {_first_line(_inner(cause))}"


def _attempt(job: TrainJob, report: Report) -> BaseException | None:
    """Why it failed, if it did and may not do so again. Raises the error that it would meet again."""
    relay = ray.remote(num_cpus=0)(_Relay).remote()
    # Ray Train replaces the handler of SIGINT where it is called in the main thread, and Ctrl-C is the workflow's.
    fit = _in_background(_trainer(job, relay).fit, f"ray train of {job.name}")
    with interruptible():
        while not wait([fit], POLL_INTERVAL_S).done:
            _forward(relay, report)
        _forward(relay, report)
        failure = fit.exception()
        permanent: Exception | None = ray.get(relay.error.remote()) if failure is not None else None
    ray.kill(relay)
    if permanent is not None:
        raise permanent from failure
    if failure is not None and not isinstance(failure, TrainingFailedError | ray.exceptions.RayError):
        raise failure
    return failure


def _in_background(call: Callable[[], Any], name: str) -> Future[Any]:
    """In a thread that nothing waits for at the end of this process, unlike those of an executor."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _trainer(job: TrainJob, relay: Any) -> TorchTrainer:
    use_gpu = job.execution.device == "cuda"
    # Ray Train wants a folder that all nodes see, though nothing is reported to it: the checkpoints are ours.
    filesystem, folder = fsspec.core.url_to_fs(job.store.location(job.launcher))
    # Otherwise each rank works in a folder of its own, and a recipe's relative paths mean nothing there.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    trainer = LocalTorchTrainer if job.execution.cluster == "local" else TorchTrainer
    return trainer(
        _run_rank,
        train_loop_config={"job": job, "relay": relay},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.execution.ranks,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": _cpus_each(job, ray.cluster_resources()), **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            name=f"{job.node}-{uuid.uuid4().hex[:8]}",  # nothing of an earlier run is to be picked up
            storage_path=folder,
            storage_filesystem=PyFileSystem(FSSpecHandler(filesystem)),
            failure_config=FailureConfig(max_failures=0),  # `launch` tells which are tried again
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _cpus_each(job: TrainJob, resources: Mapping[str, float]) -> float:
    """What a rank asks Ray for: one CPU, or its share of a local machine that has fewer: it would wait for ever."""
    if job.execution.cluster != "local":
        return 1.0
    return min(1.0, resources.get("CPU", 1.0) / job.execution.ranks)


def _run_rank(config: dict[str, Any]) -> None:
    from pipelines.train.loop import train_worker

    relay = config["relay"]
    try:
        train_worker(config["job"], QueuedReport(relay.push.remote))
    except PERMANENT_ERRORS as error:
        ray.get(relay.fail.remote(_portable(error)))
        raise
    ray.get(relay.error.remote())  # calls are in order: what was pushed before has arrived


def _portable(error: Exception) -> Exception:
    """The same, or its message where it can't be sent."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception as unsendable:  # noqa: BLE001 - whatever an exception's own pickling raises
        logger.warning("%s is sent as its message alone: %s", type(error).__name__, unsendable)
        return TrainError(str(error))
    return error


def _forward(relay: Any, report: Report) -> None:
    for event in ray.get(relay.drain.remote()):
        event.apply(report)


def _inner(error: BaseException) -> BaseException:
    """What Ray Train has wrapped."""
    names = ("cause",) if isinstance(error, ray.exceptions.RayTaskError) else ("_base_exc", "health_check_failure")
    inner = next((inner for name in names if isinstance(inner := getattr(error, name, None), BaseException)), None)
    return error if inner is None else _inner(inner)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
