"""A real local Ray, by `infra.cluster`: who may enter, how it ends, and what becomes of a dead worker's tasks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray

from infra.cluster import Cluster, ClusterError, ClusterSpec, cluster
from infra.tasks import bounded, map_actors

SPEC = ClusterSpec(num_cpus=2, object_store_bytes=80 * 2**20, forward_output=False)


@pytest.fixture(scope="module")
def local() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as environment:
        # A cluster that isn't there: "local" must not look at it.
        environment.setenv("RAY_ADDRESS", "127.0.0.1:1")
        environment.setenv("RAY_AUTH_MODE", "disabled")
        with cluster(SPEC) as running:
            own_child = subprocess.Popen(["sleep", "600"])
            yield running
        try:
            assert own_child.poll() is None  # only Ray's processes are ended
        finally:
            own_child.kill()
            own_child.wait()


@ray.remote(max_retries=0)
def square(number: int) -> int:
    return number * number


@ray.remote(max_retries=0)
def fragile(number: int) -> int:
    if number == 3:
        os._exit(1)
    if number == 4:
        raise ValueError("four is refused")
    return number


@ray.remote(max_retries=2)
def dies_once(folder: str, number: int) -> int:
    marker = Path(folder) / str(number)
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return number


@ray.remote
class Counter:
    """Ends its process on the number -1; on -2 once per folder."""

    def __init__(self, folder: str) -> None:
        self.marker = Path(folder) / "died"

    def add_one(self, number: int) -> int:
        if number == -1 or (number == -2 and not self.marker.exists()):
            self.marker.touch()
            os._exit(1)
        return number + 1


@ray.remote
def inherited_settings() -> tuple[str | None, str | None, str]:
    return os.environ.get("RAY_AUTH_MODE"), os.environ.get("RAY_ADDRESS"), ray.util.get_node_ip_address()


def cluster_id(address: str, headers: tuple[tuple[str, str], ...]) -> bytes:
    """Asks Ray's control service for the cluster's id, as every client does first."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
        return bytes(call(b"", metadata=headers, timeout=10))


def listening_addresses(processes: list[psutil.Process]) -> set[str]:
    addresses = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found = process.net_connections(kind="tcp")
            addresses |= {seen.laddr.ip for seen in found if seen.status == psutil.CONN_LISTEN}
    return addresses


def test_a_local_cluster_is_its_own_and_on_loopback_only(local: Cluster) -> None:
    assert local.num_cpus == 2
    assert local.address.startswith("127.0.0.1:")
    mode, ray_address, worker_ip = ray.get(inherited_settings.remote())
    assert (mode, worker_ip) == ("token", "127.0.0.1")
    assert ray_address is None or ray_address == local.address
    addresses = listening_addresses([psutil.Process(), *psutil.Process().children(recursive=True)])
    assert addresses
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_only_who_knows_the_token_may_enter(local: Cluster) -> None:
    import grpc

    token_path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token_path.stat().st_mode & 0o777 == 0o600
    assert token_path.parent.stat().st_mode & 0o777 == 0o700
    assert cluster_id(local.address, (("authorization", f"Bearer {token_path.read_text()}"),))
    for headers in ((), (("authorization", "Bearer " + "0" * 64),)):
        with pytest.raises(grpc.RpcError) as refused:
            cluster_id(local.address, headers)
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_a_second_cluster_in_one_process_is_refused(local: Cluster) -> None:
    with pytest.raises(ClusterError, match="already uses"), cluster(SPEC):
        pass


JOIN = """
import sys
from infra.cluster import ClusterSpec, cluster
with cluster(ClusterSpec(address=sys.argv[1], forward_output=False)) as joined:
    print(joined.address, joined.num_cpus)
"""


def test_a_running_cluster_is_joined_by_its_address_and_left_running(local: Cluster) -> None:
    command = [sys.executable, "-c", JOIN, local.address]  # the token comes from the environment
    joined = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=Path.cwd())
    assert joined.stdout.split() == [local.address, "2"]
    assert ray.get(square.remote(3), timeout=30) == 9


TRY = """
import sys
from infra.cluster import ClusterError, ClusterSpec, cluster
try:
    cluster(ClusterSpec(address=sys.argv[1])).__enter__()
except ClusterError as error:
    print(error)
"""


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "http://127.0.0.1:8265", "nonsense"])
def test_a_cluster_that_is_not_there_is_one_clear_error_at_once(address: str) -> None:
    command = [sys.executable, "-c", TRY, address]
    tried = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, cwd=Path.cwd())
    assert repr(address) in tried.stdout


def test_bounded_yields_every_item_with_its_value_and_reads_items_as_room_is_made(local: Cluster) -> None:
    read = 0

    def numbers() -> Iterator[int]:
        nonlocal read
        for number in range(12):
            read += 1
            yield number

    seen = {}
    for finished, outcome in enumerate(bounded(square.remote, numbers(), limit=3)):
        assert read - finished <= 4  # three in flight, and one looked at
        seen[outcome.item] = outcome.result()
    assert seen == {number: number * number for number in range(12)}


def test_bounded_hands_over_errors_and_goes_on(local: Cluster) -> None:
    outcomes = {outcome.item: outcome for outcome in bounded(fragile.remote, range(6), limit=2)}
    assert isinstance(outcomes[3].error, ray.exceptions.WorkerCrashedError)
    assert isinstance(outcomes[4].error, ValueError)
    with pytest.raises(ValueError, match="four is refused"):
        outcomes[4].result()
    assert [outcomes[number].result() for number in (0, 1, 2, 5)] == [0, 1, 2, 5]


def test_bounded_lets_ray_retry_a_task_whose_worker_died(local: Cluster, tmp_path: Path) -> None:
    outcomes = bounded(lambda number: dies_once.remote(str(tmp_path), number), range(2), limit=2)
    assert sorted(outcome.result() for outcome in outcomes) == [0, 1]


def test_closing_bounded_cancels_what_is_in_flight(local: Cluster, tmp_path: Path) -> None:
    @ray.remote(max_retries=0)
    def slow(number: int) -> None:
        (tmp_path / str(number)).touch()
        while number < 2 or len(list(tmp_path.iterdir())) < 3:
            time.sleep(0.02)

    outcomes = bounded(slow.options(num_cpus=0.5).remote, range(3), limit=3)
    assert next(outcomes).item == 2  # when all have begun
    outcomes.close()
    assert ray.get(square.options(num_cpus=2).remote(2), timeout=30) == 4  # both CPUs are free


@pytest.mark.parametrize("limit", [0, -1])
def test_bounded_refuses_a_limit_below_one(limit: int) -> None:
    with pytest.raises(ValueError, match=str(limit)):
        next(bounded(square.remote, [1], limit=limit))


def test_actors_share_the_items(local: Cluster, tmp_path: Path) -> None:
    actors = [Counter.options(num_cpus=0.5).remote(str(tmp_path)) for _ in range(2)]
    outcomes = list(map_actors(actors, "add_one", range(9)))
    assert {outcome.item: outcome.result() for outcome in outcomes} == {number: number + 1 for number in range(9)}


def test_an_actor_that_dies_is_restarted_and_its_call_retried(local: Cluster, tmp_path: Path) -> None:
    actor = Counter.options(num_cpus=0.5, max_restarts=1, max_task_retries=1).remote(str(tmp_path))
    outcomes = map_actors([actor], "add_one", [1, -2, 3], in_flight_per_actor=1)
    assert sorted(outcome.result() for outcome in outcomes) == [-1, 2, 4]


def test_a_dead_actor_is_left_out_and_the_others_go_on(local: Cluster, tmp_path: Path) -> None:
    actors = [Counter.options(num_cpus=0.5).remote(str(tmp_path)) for _ in range(2)]
    items = [1, -1, *range(2, 12)]
    outcomes = {outcome.item: outcome for outcome in map_actors(actors, "add_one", items, in_flight_per_actor=1)}
    assert isinstance(outcomes.pop(-1).error, ray.exceptions.ActorDiedError)
    assert {item: outcome.result() for item, outcome in outcomes.items()} == {n: n + 1 for n in range(1, 12)}


def test_all_actors_dead_is_an_error_only_if_work_is_left(local: Cluster, tmp_path: Path) -> None:
    last = Counter.options(num_cpus=0.5).remote(str(tmp_path))
    assert [type(outcome.error) for outcome in map_actors([last], "add_one", [-1])] == [ray.exceptions.ActorDiedError]
    actor = Counter.options(num_cpus=0.5).remote(str(tmp_path))
    with pytest.raises(ClusterError, match="all 1 actors died"):
        list(map_actors([actor], "add_one", [-1, 1, 2, 3], in_flight_per_actor=1))


DRIVER = """
import os, signal, subprocess, sys, time, ray, psutil
from infra.cluster import ClusterSpec, cluster
from infra.tasks import bounded

@ray.remote
def busy(number, marker):
    subprocess.Popen(["sleep", "600"])
    open(marker, "w").close()
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass

class Foreign(BaseException):
    pass

def foreign(*_):
    raise Foreign

marker = sys.argv[1]
with cluster(ClusterSpec(num_cpus=1, object_store_bytes=80 * 2**20, forward_output=False)):
    references = [busy.remote(number, marker) for number in range(2)]
    while not os.path.exists(marker):
        time.sleep(0.05)
    pids = [child.pid for child in psutil.Process().children(recursive=True)]
    print(os.path.dirname(os.environ["RAY_AUTH_TOKEN_PATH"]), *pids, flush=True)
    MODE
"""


def start_driver(mode: str, marker: Path) -> tuple[subprocess.Popen[str], Path, list[psutil.Process]]:
    code = DRIVER.replace("MODE", mode)
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(marker)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path.cwd(),
        start_new_session=True,
    )
    assert driver.stdout is not None
    folder, *pids = driver.stdout.readline().split()
    assert len(pids) >= 4
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):  # a driver that fails may be faster than this
            processes.append(psutil.Process(int(pid)))
    return driver, Path(folder), processes


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


WAIT_LIKE_DAGSTER = "signal.signal(signal.SIGTERM, foreign); list(bounded(lambda reference: reference, references, 2))"


@pytest.mark.parametrize(
    ("mode", "stop", "exit_codes", "last_line"),
    [
        ("time.sleep(600)", signal.SIGKILL, {-signal.SIGKILL}, ""),
        # To the whole group, as `timeout` does; with the handler of a library that runs the tasks' caller.
        (WAIT_LIKE_DAGSTER, signal.SIGTERM, {1, -signal.SIGINT}, "KeyboardInterrupt"),
        pytest.param(
            "time.sleep(600)", signal.SIGINT, {1, -signal.SIGINT}, "KeyboardInterrupt", marks=pytest.mark.slow
        ),
        pytest.param("raise KeyError('mine')", None, {1}, "KeyError: 'mine'", marks=pytest.mark.slow),
    ],
    ids=["killed", "waiting", "interrupted", "failed"],
)
def test_nothing_of_ray_outlives_its_driver(
    mode: str, stop: signal.Signals | None, exit_codes: set[int], last_line: str, tmp_path: Path
) -> None:
    """Also where tasks ignore that they are cancelled, and have started processes of their own."""
    driver, folder, processes = start_driver(mode, tmp_path / "busy")
    try:
        stopped_s = time.monotonic()
        if stop is not None:
            os.killpg(driver.pid, stop)
        _, errors = driver.communicate(timeout=60)
        assert time.monotonic() - stopped_s < 20, "it takes a second"
        assert driver.returncode in exit_codes
        assert errors.rstrip().endswith(last_line)
        deadline_s = time.monotonic() + 10
        while alive(processes) and time.monotonic() < deadline_s:
            time.sleep(0.1)
        assert alive(processes) == []
        assert folder.exists() == (stop == signal.SIGKILL)  # whoever comes next removes it
    finally:
        for process in alive(processes):
            process.kill()
        driver.kill()
        driver.communicate()


def test_the_folder_of_a_killed_driver_is_removed_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infra import local_ray as module

    monkeypatch.setattr(module, "STALE_AFTER_S", 0.0)
    monkeypatch.setattr(module, "MAX_TEMP_PATH_BYTES", 4096)
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))
    stale = tmp_path / f"{module.TEMP_PREFIX}killed"
    stale.mkdir()
    (stale / "lock").touch()
    with module.temp_folder() as first:
        assert not stale.exists()
        with module.temp_folder() as second:
            assert first.exists()  # its driver lives
            assert second != first
    assert list(tmp_path.iterdir()) == []
