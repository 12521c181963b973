"""Where work is spread: starts or joins a Ray cluster, and keeps a bounded number of tasks or actor calls in flight.

What the tasks are, and what to do about one that failed, is the caller's matter. Ray is imported inside the functions.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import itertools
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import psutil

from infra.processes import end, kill, killed_with_this_process, started_with
from infra.signals import before_exit, interruptible

Item = TypeVar("Item")

TEMP_PREFIX = "ldm-ray-"
# Ray puts <temp>/r/session_<26 characters>_<pid>/sockets/plasma_store in a Unix socket address of at most 107 bytes.
MAX_TEMP_PATH_BYTES = 107 - 72
STALE_AFTER_S = 60.0
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
    with _temp_folder() as temp, _local_settings(ray, _write_token(temp)):
        try:
            with _sigterm_handler_kept(), _few_processes(ray, spec), _own_process_groups(ray):
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
            f"start: {_first_line(error)}. Look into the log, and free memory and disk space under {temp.parent}"
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
            f"no Ray cluster answers at {spec.address!r}: {_first_line(error)}. Check that it runs and that "
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
def _local_settings(ray: Any, token_path: Path) -> Iterator[None]:
    """What a local cluster's processes inherit, and this process's Ray with them, while the block runs."""
    constants = ray._private.ray_constants
    before = (constants.ENABLE_RAY_CLUSTER, {name: os.environ.get(name) for name in _local_environment(token_path)})
    # Ray read this one when it was imported.
    constants.ENABLE_RAY_CLUSTER = False
    _set_environment(_local_environment(token_path))
    _reread_environment()
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before[0]
        _set_environment(before[1])
        _reread_environment()


def _local_environment(token_path: Path) -> dict[str, str | None]:
    """Values of environment variables; None removes one."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_path),
        "RAY_AUTH_TOKEN": None,
        "RAY_ADDRESS": None,
        "RAY_USAGE_STATS_ENABLED": "0",
        # "A cluster of one machine": Ray then takes 127.0.0.1 for the node's address, and all its servers listen
        # there. Without it, it replaces a given loopback address by the machine's own, and some of them listen on
        # every interface.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def _reread_environment() -> None:
    """Makes Ray see the settings of `_local_environment`, which it keeps from its first use on.

    Private names, for want of public ones in Ray 2.60; the tests see it if they change.
    """
    raylet = importlib.import_module("ray._raylet")
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


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


@contextlib.contextmanager
def _temp_folder() -> Iterator[Path]:
    """A private folder for Ray's sockets and session files, removed at the end; also removes those of killed drivers.

    The folder's lock is held by its driver: one that is free belongs to nobody.
    """
    parent = Path(tempfile.gettempdir())
    if len(os.fsencode(parent)) + len(TEMP_PREFIX) + 9 > MAX_TEMP_PATH_BYTES:
        parent = Path("/tmp")  # Unix socket addresses are short, whatever TMPDIR says
    _remove_stale(parent)
    folder = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=parent))
    try:
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    for lock_path in parent.glob(f"{TEMP_PREFIX}*/lock"):
        with contextlib.suppress(OSError), lock_path.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - lock_path.stat().st_mtime > STALE_AFTER_S:
                shutil.rmtree(lock_path.parent, ignore_errors=True)


def _write_token(folder: Path) -> Path:
    path = folder / "token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    return path


@contextlib.contextmanager
def _few_processes(ray: Any, spec: ClusterSpec) -> Iterator[None]:
    """Ray, started in the block, leaves out what a cluster for one driver has no use for.

    That is the autoscaler, the dashboard's server, which runs even without its pages, and the forwarder of output that
    nobody wants. They import Ray each: a third of the CPU seconds that a start takes.
    """
    parameter, node = ray._private.parameter, ray._private.node.Node
    before = (parameter.RayParams, node.start_api_server)
    parameter.RayParams = functools.partial(before[0], no_monitor=True, include_log_monitor=spec.forward_output)
    node.start_api_server = _start_no_server
    try:
        yield
    finally:
        parameter.RayParams, node.start_api_server = before


def _start_no_server(node: Any, **_options: Any) -> None:
    node._webui_url = ""


@contextlib.contextmanager
def _own_process_groups(ray: Any) -> Iterator[None]:
    """Ray's processes that are started in the block are out of reach of signals to this one's group.

    A terminal's Ctrl-C, `timeout` and service managers signal the whole group. Without its services, the driver would
    wait for them for seconds while it leaves.
    """
    services = ray._private.services
    before = services.ConsolePopen
    services.ConsolePopen = functools.partial(before, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = before


def _end(processes: Collection[psutil.Process]) -> None:
    """Ends Ray's `processes`: workers may clean up for a moment, its services have no state."""
    end(processes, [process for process in processes if _is_worker(process)], WORKER_GRACE_S)


def _is_worker(process: psutil.Process) -> bool:
    """Whether it runs tasks or actors, or was started by one that does."""
    with contextlib.suppress(psutil.Error):
        titles = [" ".join(one.cmdline()).strip() for one in (process, *process.parents())]
        return any(title.startswith("ray::") and not title.endswith("Agent") for title in titles)
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass(frozen=True)
class Outcome(Generic[Item]):
    """What became of one item: its `value`, or the `error` that its task or actor ended with."""

    item: Item
    value: Any = None
    error: Exception | None = None

    def result(self) -> Any:
        """The value. Raises the error if there is one."""
        if self.error is not None:
            raise self.error
        return self.value


def bounded(submit: Callable[[Item], Any], items: Iterable[Item], limit: int) -> Iterator[Outcome[Item]]:
    """Runs `submit(item)`, which returns an object reference, with at most `limit` in flight.

    `items` is read as room is made, and outcomes come in the order of completion. How often Ray retries a task whose
    worker died is `max_retries` of the remote function; after that, or if the task raises, the outcome has the error
    and the others go on. Closing the generator cancels what is in flight; a task ends once it is back in Python code.

    Raises `ValueError` if `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; at least one task must be in flight")
    ray = importlib.import_module("ray")
    waiting = _Lookahead(items)
    in_flight: dict[Any, Item] = {}
    try:
        while True:
            while len(in_flight) < limit and waiting:
                item = waiting.take()
                in_flight[submit(item)] = item
            if not in_flight:
                break
            reference = _next_finished(ray, in_flight)
            yield _outcome(ray, in_flight.pop(reference), reference)
    finally:
        _cancel(ray, in_flight)


def map_actors(
    actors: Sequence[Any], method: str, items: Iterable[Item], *, in_flight_per_actor: int = 2
) -> Iterator[Outcome[Item]]:
    """Calls `method(item)` on a pool of actors, each with at most `in_flight_per_actor` calls, in completion order.

    Two per actor keep it busy while its result is fetched. Restarts and retries after an actor's death are Ray's
    (`max_restarts`, `max_task_retries`); once those are used up, the calls in flight on that actor come out with their
    error, and the others take the rest. Closing the generator cancels what is in flight.

    Raises `ClusterError` if items are left and no actor lives; `ValueError` without actors or below one call each.
    """
    if not actors or in_flight_per_actor < 1:
        raise ValueError(f"{len(actors)} actors with {in_flight_per_actor} calls each; at least one of each is needed")
    ray = importlib.import_module("ray")
    waiting = _Lookahead(items)
    slots = deque(actor for _ in range(in_flight_per_actor) for actor in actors)
    in_flight: dict[Any, tuple[Item, Any]] = {}
    dead: list[Any] = []
    try:
        while True:
            while slots and waiting:
                actor, item = slots.popleft(), waiting.take()
                in_flight[getattr(actor, method).remote(item)] = (item, actor)
            if not in_flight:
                break
            reference = _next_finished(ray, in_flight)
            item, actor = in_flight.pop(reference)
            outcome = _outcome(ray, item, reference)
            if isinstance(outcome.error, ray.exceptions.ActorDiedError):
                logger.warning("an actor died: %s", _first_line(outcome.error))
                dead.append(actor)
                slots = deque(free for free in slots if free not in dead)
            elif actor not in dead:
                slots.append(actor)
            yield outcome
        if waiting:
            raise ClusterError(f"all {len(actors)} actors died while work was left; the log says of what")
    finally:
        _cancel(ray, in_flight)


class _Lookahead(Generic[Item]):
    """An iterator that knows whether there is more: true while there is."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self._next: list[Item] = []

    def __bool__(self) -> bool:
        if not self._next:
            self._next.extend(itertools.islice(self._items, 1))
        return bool(self._next)

    def take(self) -> Item:
        """Raises `StopIteration` at the end."""
        return self._next.pop() if self._next else next(self._items)


def _next_finished(ray: Any, in_flight: Mapping[Any, object]) -> Any:
    # Ray's waits end early on a KeyboardInterrupt alone: what else a handler of signals raises (Dagster's, or the
    # SystemExit of Ray's own for SIGTERM) they keep until a task has finished, and raise as a SystemError then.
    with interruptible():
        ready, _ = ray.wait(list(in_flight), num_returns=1, fetch_local=False)
    return ready[0]


def _outcome(ray: Any, item: Item, reference: Any) -> Outcome[Item]:
    try:
        with interruptible():
            return Outcome(item, value=ray.get(reference))
    except ray.exceptions.RayError as error:
        return Outcome(item, error=error)


def _cancel(ray: Any, references: Iterable[Any]) -> None:
    if not ray.is_initialized():
        return
    for reference in references:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.cancel(reference)
