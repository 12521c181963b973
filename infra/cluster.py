"""Where work is spread: starts or joins a Ray cluster, and leaves it so that nothing of it stays.

What is done there, with a bounded number of calls in flight, is `infra.tasks`'s matter. Ray is imported inside the
functions.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from infra.local_ray import few_processes, local_settings, own_process_groups, temp_folder, write_token
from infra.processes import end, kill, killed_with_this_process, started_with
from infra.signals import before_exit, interruptible

WORKER_GRACE_S = 0.5
CONNECT_TIMEOUT_S = 10.0

logger = logging.getLogger(__name__)


class ClusterError(Exception):
    """A cluster can't be started, reached or used; the message says which one, why, and what to do."""


@dataclass(frozen=True)
class ClusterSpec:
    """Which Ray cluster to work on.

    `address`: "local" starts one for this process alone; "auto", "host:port" and "ray://host:port" join one that runs.
    `num_cpus`: of a local cluster; None takes what this process may use. `object_store_bytes`: shared memory of a
    local cluster, at least 75 MiB. `forward_output`: what workers print comes out on this process's stdout and stderr
    (see `infra.logs.captured_output`); without it, it lies in Ray's session folder and goes when the cluster goes.
    """

    address: str = "local"
    num_cpus: int | None = None
    object_store_bytes: int = 256 * 2**20
    forward_output: bool = True


@dataclass(frozen=True)
class Cluster:
    """A running cluster, as seen by its driver."""

    address: str
    num_cpus: int
    num_gpus: int


@contextlib.contextmanager
def cluster(spec: ClusterSpec) -> Iterator[Cluster]:
    """Starts or joins the cluster; leaves it, and stops a local one, however the block ends.

    A local cluster listens on loopback only, asks every client for a token that nobody else can read, sends no usage
    statistics, and dies with this process, even by SIGKILL. (Linux ties it to the thread that started it: enter this
    context in a thread that lives as long as the work.) RAY_ADDRESS is honoured for "auto" alone. SIGINT and SIGTERM
    raise `KeyboardInterrupt` in the block (see `infra.signals`); tasks of a local cluster that go on are killed then.

    Raises `ClusterError` if this process already uses a cluster, or if the cluster doesn't start or answer.
    """
    ray = importlib.import_module("ray")
    if ray.is_initialized():
        raise ClusterError("this process already uses a Ray cluster; leave it before entering another")
    if spec.address.startswith(("http://", "https://")):
        raise ClusterError(
            f"cluster address {spec.address!r} is a Ray Jobs address; to join from here give host:port (the GCS port, "
            "6379 by default), ray://host:10001 or auto"
        )
    logging.getLogger("ray").propagate = True  # to this process's own log, instead of a handler on stderr
    with interruptible(), _local_cluster(ray, spec) if spec.address == "local" else _joined_cluster(ray, spec):
        resources = ray.cluster_resources()
        yield Cluster(
            address=ray.get_runtime_context().gcs_address,
            num_cpus=int(resources.get("CPU", 0)),
            num_gpus=int(resources.get("GPU", 0)),
        )


@contextlib.contextmanager
def _local_cluster(ray: Any, spec: ClusterSpec) -> Iterator[None]:
    with temp_folder() as temp, local_settings(ray, write_token(temp)):
        try:
            with _sigterm_handler_kept(), few_processes(ray, spec.forward_output), own_process_groups(ray):
                _start(ray, spec, temp)
            # The kernel ties Ray's first processes to their driver, but in Ray 2.60 the agents of a killed raylet live
            # on for 60 s, the hard-coded timeout of their farewell to a control service that is gone too.
            with killed_with_this_process(started_with(str(temp))), before_exit(lambda: kill(started_with(str(temp)))):
                yield
        finally:
            _stop(ray, temp)


def _stop(ray: Any, temp: Path) -> None:
    """Disconnects from the local cluster, then ends its processes.

    Ray would end one after the other, and wait a second for each that is busy; nothing that they could still save is
    of use to anybody.
    """
    known = started_with(str(temp))  # those of a worker that Ray has ended before are nobody's children later
    node = ray._private.worker._global_node
    if node is not None:
        reap = node.kill_all_processes

        def end_and_reap(**options: Any) -> None:
            _end({*known, *started_with(str(temp))})
            reap(**options)

        node.kill_all_processes = end_and_reap
    try:
        ray.shutdown()
    finally:
        _end({*known, *started_with(str(temp))})


def _start(ray: Any, spec: ClusterSpec, temp: Path) -> None:
    started_s = time.monotonic()
    num_cpus = spec.num_cpus if spec.num_cpus is not None else len(os.sched_getaffinity(0))
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=spec.object_store_bytes,
            include_dashboard=False,
            log_to_driver=spec.forward_output,
            configure_logging=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(temp / "r"),  # Ray opens this one to everybody; the folder above is ours alone
        )
    except (RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"a local Ray cluster with {num_cpus} CPUs and {spec.object_store_bytes} bytes of object store did not "
            f"start: {first_line(error)}. Look into the log, and free memory and disk space under {temp.parent}"
        ) from error
    logger.info("local Ray cluster with %d CPUs started in %.1f s", num_cpus, time.monotonic() - started_s)


@contextlib.contextmanager
def _joined_cluster(ray: Any, spec: ClusterSpec) -> Iterator[None]:
    try:
        _check_that_somebody_listens(spec.address)
        with _sigterm_handler_kept():
            ray.init(address=spec.address, log_to_driver=spec.forward_output, configure_logging=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {spec.address!r}: {first_line(error)}. Check that it runs and that "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH holds its token, or use the address local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_that_somebody_listens(address: str) -> None:
    """Raises `OSError` if not: Ray itself tries for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if separator and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()


@contextlib.contextmanager
def _sigterm_handler_kept() -> Iterator[None]:
    """`ray.init` replaces the handler of SIGTERM; the former one comes back. Only the main thread has a say."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as error:  # its handler's answer
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(processes: Collection[psutil.Process]) -> None:
    """Ends Ray's `processes`: workers may clean up for a moment, its services have no state."""
    end(processes, [process for process in processes if _is_worker(process)], WORKER_GRACE_S)


def _is_worker(process: psutil.Process) -> bool:
    """Whether it runs tasks or actors, or was started by one that does."""
    with contextlib.suppress(psutil.Error):
        titles = [" ".join(one.cmdline()).strip() for one in (process, *process.parents())]
        return any(title.startswith("ray::") and not title.endswith("Agent") for title in titles)
    return False


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
