"""Runs in a real MLflow on SQLite: what arrives, also if the database is locked, the server away, the driver dead."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.spool import Journal
from infra.tracking import RunHandle, Tracker, TrackingSpec
from infra.tracking_delivery import RUN_KEY_TAG
from infra.tracking_server import without_password

# MLflow 3.17 maps its tables in a way that SQLAlchemy 2.1 gives up.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@contextlib.contextmanager
def locked(spec: TrackingSpec) -> Iterator[None]:
    connection = sqlite3.connect(spec.state_dir / "mlflow.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")
        connection.close()


def runs(client: Any, spec: TrackingSpec) -> dict[str, Any]:
    experiment = client.get_experiment_by_name(spec.experiment)
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])} if experiment else {}


def history(client: Any, run: Any, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]


def artifact(spec: TrackingSpec, run: Any, path: str) -> bytes:
    folder = run.info.artifact_uri.removeprefix("file://")
    assert folder.startswith(str(spec.state_dir / "mlartifacts"))
    return (Path(folder) / path).read_bytes()


def test_a_run_and_its_nodes_arrive_whole(spec: TrackingSpec, client: Any) -> None:
    tracker = Tracker(spec)
    workflow = tracker.start_run("quickstart", {"recipe": "quickstart"})
    node = workflow.child("train.base", {"revision": "abc"})
    node.params({"optimizer.lr": 1e-4, "ema": True, "init": None, "name": "small"})
    for step in range(1, 4):
        node.metrics({"loss": 1 / step, "images_per_s": 20.0}, step)
    node.metrics({"seconds": 12.5})
    node.figure("samples/step_000003.png", b"\x89PNG")
    node.document("manifest.json", "{}")
    assert node.finish() is True
    assert workflow.finish("FAILED") is True

    found = runs(client, spec)
    train = found["train.base"]
    assert found["quickstart"].info.status == "FAILED"
    assert train.info.status == "FINISHED"
    assert train.data.tags["mlflow.parentRunId"] == found["quickstart"].info.run_id == workflow.run_id
    assert train.info.run_id == node.run_id
    assert train.data.tags["revision"] == "abc"
    assert train.data.tags["latentworks.process"] == f"{socket.gethostname()}:{os.getpid()}"
    assert train.data.params == {"optimizer.lr": "0.0001", "ema": "True", "init": "None", "name": "small"}
    assert history(client, train, "loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert history(client, train, "seconds") == [(0, 12.5)]
    assert artifact(spec, train, "samples/step_000003.png") == b"\x89PNG"
    assert artifact(spec, train, "manifest.json") == b"{}"
    assert list((spec.state_dir / "spool").iterdir()) == []


def test_the_database_is_made_in_the_background(fresh_database: Any) -> None:
    assert not fresh_database.there_at_start


def test_more_than_a_batch_of_metrics_and_params(spec: TrackingSpec, client: Any) -> None:
    run = Tracker(spec).start_run("many")
    for step in range(1250):
        run.metrics({"a": float(step), "b": -float(step)}, step)
    run.params({f"p{index}": index for index in range(230)})
    assert run.finish(timeout_s=60)
    found = runs(client, spec)["many"]
    assert history(client, found, "b") == [(step, -float(step)) for step in range(1250)]
    assert len(found.data.params) == 230


def test_names_and_values_are_made_fit_for_mlflow(
    spec: TrackingSpec, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = Tracker(spec).start_run("Läufe #1", {"tag": "t" * 9000})
    run.params({"models.a[0]=x": "v", "long": "x" * 10_000, "n" * 300: 1})
    run.metrics({"loss (mean)/../x": 0.5, "nan": math.nan}, 1)
    assert run.finish()
    found = runs(client, spec)["L_ufe _1"]
    assert found.data.params["models.a_0__x"] == "v"
    assert found.data.params["n" * 250] == "1"
    assert len(found.data.params["long"]) == 6000
    assert found.data.params["long"].endswith("x… [10,000 characters]")
    assert found.data.tags["tag"].endswith("[9,000 characters]")
    assert found.data.metrics["loss _mean_/x"] == 0.5
    assert math.isnan(found.data.metrics["nan"])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", ["/etc/passwd", "../up.png", "a/../../b", ""])
def test_an_artifact_stays_in_its_run(spec: TrackingSpec, name: str) -> None:
    run = Tracker(spec).start_run("run")
    with pytest.raises(ValueError, match="relative path"):
        run.figure(name, b"")
    run.finish()


def test_what_mlflow_refuses_is_dropped_alone_with_one_warning(
    spec: TrackingSpec, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "infra")
    run = Tracker(spec).start_run("run")
    run.params({"lr": 1})
    run.params({"lr": 2, "steps": 3})  # MLflow's params are written once
    run.params({"lr": 4})
    run.metrics({"loss": 0.5}, 1)
    assert run.finish()
    found = runs(client, spec)["run"]
    assert found.data.params == {"lr": "1", "steps": "3"}
    assert found.data.metrics == {"loss": 0.5}
    assert len([record for record in caplog.records if "refused" in record.message]) == 2
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_threads_report_at_once(spec: TrackingSpec, client: Any) -> None:
    run = Tracker(spec).start_run("threads")

    def report(name: str) -> None:
        for step in range(200):
            run.metrics({name: float(step)}, step)

    threads = [threading.Thread(target=report, args=(f"m{index}",)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert run.finish(timeout_s=60)
    found = runs(client, spec)["threads"]
    assert all(len(history(client, found, f"m{index}")) == 200 for index in range(4))


def test_two_open_runs_of_one_tracker(spec: TrackingSpec, client: Any) -> None:
    tracker = Tracker(spec)
    first, second = tracker.start_run("first"), tracker.start_run("second")
    assert first.finish()
    second.metrics({"loss": 1.0}, 1)
    assert second.finish()
    assert {name: run.info.status for name, run in runs(client, spec).items()} == {
        "first": "FINISHED",
        "second": "FINISHED",
    }


def test_a_run_that_nobody_finished_is_killed_at_the_close(spec: TrackingSpec, client: Any) -> None:
    tracker = Tracker(spec)
    workflow = tracker.start_run("workflow")
    workflow.child("acquire")
    assert tracker.close()
    assert {run.info.status for run in runs(client, spec).values()} == {"KILLED"}


def test_a_locked_database_holds_nobody_up_and_everything_arrives_with_its_time(
    spec: TrackingSpec, client: Any
) -> None:
    tracker = Tracker(spec)
    run = tracker.start_run("run")
    assert tracker.flush()
    with locked(spec):
        before_ms = time.time() * 1000
        started_s = time.monotonic()
        child = run.child("node")
        for step in range(50):
            child.metrics({"loss": float(step)}, step)
        assert time.monotonic() - started_s < 4, "SQLite itself waits for 5 s"
        after_ms = time.time() * 1000
        time.sleep(0.3)
    released_ms = time.time() * 1000
    assert child.finish()
    assert run.finish(timeout_s=60)
    node = runs(client, spec)["node"]
    times_ms = [metric.timestamp for metric in client.get_metric_history(node.info.run_id, "loss")]
    assert len(times_ms) == 50
    assert before_ms - 1 <= min(times_ms) <= max(times_ms) <= after_ms < released_ms
    assert before_ms - 1 <= node.info.start_time <= after_ms


def test_a_database_that_is_gone_for_a_while_gets_everything_when_it_is_back(
    spec: TrackingSpec, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = Tracker(spec).start_run("run")
    run.metrics({"loss": 0.0}, 0)
    assert run._tracker.flush(60)
    database, elsewhere = spec.state_dir / "mlflow.db", spec.state_dir / "elsewhere.db"
    database.rename(elsewhere)
    for step in range(1, 20):
        run.metrics({"loss": float(step)}, step)
    wait_for(lambda: "does not answer" in caplog.text)
    elsewhere.replace(database)
    assert run.finish(timeout_s=60)
    assert history(client, runs(client, spec)["run"], "loss") == [(step, float(step)) for step in range(20)]


def test_what_could_not_be_sent_waits_in_the_spool_and_the_next_run_sends_it(
    spec: TrackingSpec, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(spec)
    run = tracker.start_run("first run")
    with locked(spec):
        run.metrics({"loss": 0.25}, 7)
        run.figure("grid.png", b"png")
        started_s = time.monotonic()
        assert run.finish(timeout_s=0.5) is False
        assert time.monotonic() - started_s < 4.5, "SQLite itself waits for 5 s"
        logged_ms = time.time() * 1000
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert str(spec.state_dir / "spool") in warnings[0]
    wait_for(lambda: sender_threads() == [])  # it gives up as soon as SQLite returns

    time.sleep(0.05)
    assert Tracker(spec).start_run("second run").finish(timeout_s=30)
    found = runs(client, spec)
    assert set(found) == {"first run", "second run"}
    first = found["first run"]
    assert first.info.status == "FINISHED"
    assert history(client, first, "loss") == [(7, 0.25)]
    assert client.get_metric_history(first.info.run_id, "loss")[0].timestamp <= logged_ms
    assert artifact(spec, first, "grid.png") == b"png"
    assert list((spec.state_dir / "spool").iterdir()) == []


def test_a_server_that_is_away_is_one_warning_and_no_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # nobody listens there
        uri = f"http://user:hunter2@127.0.0.1:{reserved.getsockname()[1]}"
        run = Tracker(TrackingSpec(uri, "away", tmp_path)).start_run("run")
        run.metrics({"loss": 1.0}, 1)
        wait_for(lambda: "does not answer" in caplog.text)
        assert run.finish(timeout_s=0.1) is False
        assert run.run_id is None
    wait_for(lambda: sender_threads() == [])
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("infra")]
    assert len([message for message in messages if "does not answer" in message and "sent later" in message]) == 1
    assert all("hunter2" not in message for message in messages)
    spooled = list((tmp_path / "spool").glob("*.jsonl"))
    assert len(spooled) == 1
    assert "hunter2" not in spooled[0].read_text()
    assert spooled[0].stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_server_that_comes_late_gets_everything(tmp_path: Path) -> None:
    import mlflow

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = Tracker(TrackingSpec(f"http://127.0.0.1:{port}", "late", tmp_path / "state")).start_run("run")
    run.metrics({"loss": 0.5}, 3)
    run.document("notes/a.txt", "text")
    time.sleep(5)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    database = f"sqlite:///{tmp_path / 'server.db'}"
    command += ["--backend-store-uri", database, "--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        assert run.finish(timeout_s=90)
        client = mlflow.MlflowClient(f"http://127.0.0.1:{port}")
        found = client.get_run(run.run_id)
        assert (found.info.status, found.data.metrics) == ("FINISHED", {"loss": 0.5})
        text = Path(client.download_artifacts(run.run_id, "notes/a.txt", str(tmp_path))).read_text()
        assert text == "text"
        assert run.url_hint.endswith(f"/#/experiments/{found.info.experiment_id}/runs/{run.run_id}")
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_entries_are_for_one_server_only(spec: TrackingSpec, client: Any) -> None:
    other = Journal.create(spec.state_dir / "spool", "http://elsewhere experiment")
    other.append({"kind": "run", "run": "k", "parent": None, "name": "not here", "tags": {}, "time_ms": 1})
    other.close()
    assert Tracker(spec).start_run("here").finish()
    assert set(runs(client, spec)) == {"here"}
    assert other.path.exists()


DRIVER = """
import sys, time
from pathlib import Path
from infra.tracking import Tracker, TrackingSpec

tracker = Tracker(TrackingSpec(None, sys.argv[1], Path(sys.argv[2])))
run = tracker.start_run("killed")
node = run.child("node")
if sys.argv[3] == "sent":
    assert tracker.flush(60)
for step in range(20):
    node.metrics({"loss": float(step)}, step)
if sys.argv[3] == "sent":
    assert tracker.flush(60)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["sent", "unsent"])
def test_the_next_run_completes_and_ends_those_of_a_killed_driver(spec: TrackingSpec, client: Any, how: str) -> None:
    with locked(spec) if how == "unsent" else contextlib.nullcontext():
        driver = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", DRIVER, spec.experiment, str(spec.state_dir), how],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path.cwd(),
        )
        assert driver.stdout is not None
        with driver.stdout:
            assert driver.stdout.readline() == "ready\n"
        if how == "sent":
            # While its driver lives, a journal is nobody else's.
            assert Tracker(spec).start_run("meanwhile").finish()
            assert runs(client, spec)["node"].info.status == "RUNNING"
        driver.kill()
        assert driver.wait() == -signal.SIGKILL
    assert Tracker(spec).start_run("next").finish(timeout_s=30)
    found = runs(client, spec)
    assert (found["killed"].info.status, found["node"].info.status) == ("KILLED", "KILLED")
    assert found["node"].info.end_time < found["next"].info.start_time
    assert history(client, found["node"], "loss") == [(step, float(step)) for step in range(20)]


def test_sending_twice_changes_nothing(spec: TrackingSpec, client: Any) -> None:
    """As after a crash between MLflow's answer and the note of it."""
    tracker = Tracker(spec)
    run = tracker.start_run("run")
    node = run.child("node")
    node.params({"lr": 1})
    node.metrics({"loss": 0.5}, 1)
    node.document("a.txt", "text")
    node.finish()
    assert tracker.flush()
    journal = next((spec.state_dir / "spool").glob("*.jsonl"))
    copy = journal.with_name("copy.jsonl")
    shutil.copy(journal, copy)  # without its progress
    assert run.finish()
    assert Tracker(spec).start_run("next").finish()
    assert not copy.exists()
    found = runs(client, spec)
    assert set(found) == {"run", "node", "next"}
    assert len(client.search_runs([found["run"].info.experiment_id])) == 3
    assert history(client, found["node"], "loss") == [(1, 0.5)]
    assert artifact(spec, found["node"], "a.txt") == b"text"
    assert found["node"].data.tags["mlflow.parentRunId"] == found["run"].info.run_id
    assert len(found["node"].data.tags[RUN_KEY_TAG]) == 32


def test_half_a_line_is_dropped_and_a_damaged_one_left_out(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path, "here")
    journal.append({"kind": "a"})
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b'{"kind": "cut of')
    (again,) = Journal.left_behind(tmp_path)
    again.append({"kind": "b"})
    assert [entry["kind"] for entry, _ in again.undelivered(10)] == ["header", "a", "b"]
    os.write(again._descriptor, b"\0\0\n")
    again.append({"kind": "c"})
    assert [entry["kind"] for entry, _ in again.undelivered(10)] == ["header", "a", "b", "header", "c"]
    assert list(Journal.left_behind(tmp_path)) == []  # this one has it
    again.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_loses_figures_but_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "state"
    blocked.write_text("a file where the folder should be")
    run = Tracker(TrackingSpec(None, "x", blocked)).start_run("run")
    run.metrics({"loss": 1.0}, 1)
    assert run.finish() is True
    assert len(caplog.records) == 1
    assert "is lost" in caplog.text


def test_a_database_that_was_not_finished_does_not_stay_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full, or the process killed, while MLflow makes its tables."""
    import mlflow

    class Interrupted(mlflow.MlflowClient):
        def __init__(self, uri: str) -> None:
            Path(uri.removeprefix("sqlite:///")).write_bytes(b"half a database")
            raise OSError("disk full")

    spec = TrackingSpec(None, "half", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("mlflow.MlflowClient", Interrupted)
        first = Tracker(spec).start_run("first")
        wait_for(lambda: "disk full" in caplog.text)
        assert first.finish(timeout_s=0.1) is False
    wait_for(lambda: sender_threads() == [])
    assert [path.name for path in tmp_path.iterdir()] == ["spool"]
    assert Tracker(spec).start_run("second").finish(timeout_s=120)
    assert set(runs(mlflow.MlflowClient(spec.resolved_uri), spec)) == {"first", "second"}


def test_where_to_look(spec: TrackingSpec, tmp_path: Path) -> None:
    run = RunHandle(Tracker(spec), "key", None)
    assert run.url_hint == f"mlflow server --backend-store-uri sqlite:///{spec.state_dir / 'mlflow.db'}"
    served = RunHandle(Tracker(TrackingSpec("http://me:secret@host:5000/", "x", tmp_path)), "key", None)
    assert served.url_hint == "http://host:5000/#/experiments"


def test_without_password() -> None:
    assert without_password("postgresql://me:p%40ss@db:5432/mlflow") == "postgresql://db:5432/mlflow"
    assert without_password("sqlite:////tmp/a@b/mlflow.db") == "sqlite:////tmp/a@b/mlflow.db"


def sender_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "spool-sender"]


def wait_for(condition: Any, timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "took too long"
        time.sleep(0.05)
