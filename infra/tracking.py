"""MLflow, and the only module that knows it: what runs say of themselves, sent by one background thread.

Nothing here waits for MLflow or fails because of it. Each call is written to a journal (`infra.spool`) and returns; the
thread sends the journal on. While the database is locked or the server is away, the journal grows; what is left when
the process ends, or is killed, is sent by the next one, into the same runs and with the original times.
"""

from __future__ import annotations

import functools
import getpass
import importlib
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from infra.spool import Away, Entry, Journal, Sender

Status = Literal["FINISHED", "FAILED", "KILLED"]
Scalar = str | int | float | bool | None

# Limits of MLflow 3 (mlflow.utils.validation).
MAX_NAME_LENGTH = 250
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
MAX_PARAMS_PER_BATCH = 100
MAX_METRICS_PER_BATCH = 1000
MAX_REASON_LENGTH = 300
RUN_KEY_TAG = "latentworks.run_key"

# MLflow's codes for "this entry will never be accepted"; all else is taken for "not now".
REJECTED = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST"}

logger = logging.getLogger(__name__)

MIGRATIONS = threading.Lock()
"""Held while MLflow makes or checks its database: alembic, which does it, keeps its state in globals, so that another
library's migration at the same moment fails (seen with Dagster's). Others in this process hold it for theirs."""


@dataclass(frozen=True)
class TrackingSpec:
    """Where runs are recorded.

    `uri`: an MLflow tracking URI (http, sqlite, postgresql); None is an SQLite file in `state_dir`. `experiment`: its
    name. `state_dir`: a local folder for that file, for the spool, and, unless a server keeps them, for artifacts.
    """

    uri: str | None
    experiment: str
    state_dir: Path

    @property
    def resolved_uri(self) -> str:
        return self.uri or f"sqlite:///{self.state_dir.resolve() / 'mlflow.db'}"

    @property
    def artifact_location(self) -> str | None:
        """None leaves it to the server."""
        if self.resolved_uri.startswith(("http://", "https://")):
            return None
        return (self.state_dir.resolve() / "mlartifacts").as_uri()

    @property
    def target(self) -> str:
        """The server and experiment without a password: a journal is sent to the target it was written for."""
        return f"{without_password(self.resolved_uri)} {self.experiment}"


class Tracker:
    """Records runs. One per process; MLflow is imported and its database made in the thread of the first run."""

    def __init__(self, spec: TrackingSpec) -> None:
        self.spec = spec
        self._changing = threading.Lock()
        self._sender: Sender | None = None
        self._delivery = _Delivery(spec)
        self._open_roots: set[str] = set()
        self._told_of_disk = False

    def start_run(self, name: str, tags: Mapping[str, str] | None = None) -> RunHandle:
        """A run of its own, such as one of a workflow; its nodes are its children."""
        return self._start_run(name, tags or {}, parent=None)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Waits until all that was reported is sent, for at most `timeout_s`; returns whether it is."""
        sender = self._sender
        return sender is None or sender.flush(timeout_s)

    def close(self, timeout_s: float = 10.0) -> bool:
        """Sends what is left, for at most `timeout_s`; a run that nobody finished becomes KILLED.

        Returns whether all was sent. If not, the rest stays in the spool for the next process, with a warning.
        """
        with self._changing:
            sender, self._sender = self._sender, None
        if sender is None or sender.stop(timeout_s):
            return True
        logger.warning(
            "MLflow at %s did not take everything within %.0f s; the rest is in %s, and the next run sends it",
            without_password(self.spec.resolved_uri),
            timeout_s,
            sender.journal.path.parent,
        )
        return False

    def _start_run(self, name: str, tags: Mapping[str, str], parent: str | None) -> RunHandle:
        key = uuid.uuid4().hex
        tags = {
            "mlflow.user": _user(),
            "mlflow.source.name": "latentworks",
            "mlflow.source.type": "LOCAL",
            "latentworks.process": f"{socket.gethostname()}:{os.getpid()}",
            **{_safe_name(tag): _shortened(value, MAX_TAG_LENGTH) for tag, value in tags.items()},
            RUN_KEY_TAG: key,
        }
        if parent is None:
            self._open_roots.add(key)
        self._append({"kind": "run", "run": key, "parent": parent, "name": _safe_name(name), "tags": tags})
        return RunHandle(self, key, parent)

    def _end_root(self, key: str, timeout_s: float) -> bool:
        self._open_roots.discard(key)
        return self.flush(timeout_s) if self._open_roots else self.close(timeout_s)

    def _append(self, entry: Entry, attachment: bytes | None = None) -> None:
        entry = {**entry, "time_ms": int(time.time() * 1000)}
        try:
            sender = self._running_sender()
            if attachment is not None:
                entry["file"] = sender.journal.attach(PurePosixPath(entry["path"]).name, attachment)
            sender.journal.append(entry)
        except OSError as error:
            if not self._told_of_disk:
                self._told_of_disk = True
                logger.warning(
                    "what runs report can't be kept in %s (%s) and is lost; free the disk", self.spec.state_dir, error
                )
        else:
            sender.wake()

    def _running_sender(self) -> Sender:
        with self._changing:
            if self._sender is None:
                journal = Journal.create(self.spec.state_dir / "spool", self.spec.target)
                _set_mlflow_environment()
                self._sender = Sender(journal, self.spec.target, self._delivery)
                self._sender.start()
            return self._sender


class RunHandle:
    """One MLflow run. Every method returns at once; names that MLflow would refuse are made fit."""

    def __init__(self, tracker: Tracker, key: str, parent: str | None) -> None:
        self._tracker = tracker
        self._key = key
        self._parent = parent

    @property
    def run_id(self) -> str | None:
        """MLflow's id; None until the run has been created there."""
        return self._tracker._delivery.run_ids.get(self._key)

    @property
    def url_hint(self) -> str:
        """The run's page, or the command that serves it."""
        uri = without_password(self._tracker.spec.resolved_uri)
        if not uri.startswith(("http://", "https://")):
            return f"mlflow server --backend-store-uri {uri}"
        experiment_id, run_id = self._tracker._delivery.experiment_id, self.run_id
        return f"{uri.rstrip('/')}/#/experiments" + (f"/{experiment_id}/runs/{run_id}" if run_id else "")

    def child(self, name: str, tags: Mapping[str, str] | None = None) -> RunHandle:
        """A run inside this one, such as one of a node."""
        return self._tracker._start_run(name, tags or {}, parent=self._key)

    def params(self, values: Mapping[str, Scalar]) -> None:
        """Values longer than MLflow keeps end with a remark that says how long they were."""
        shortened = {_safe_name(name): _shortened(str(value), MAX_PARAM_LENGTH) for name, value in values.items()}
        self._append({"kind": "params", "values": shortened})

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Without a step, MLflow shows them at step 0."""
        named = {_safe_name(name): float(value) for name, value in values.items()}
        self._append({"kind": "metrics", "values": named, "step": step or 0})

    def figure(self, name: str, png: bytes) -> None:
        """Raises `ValueError` if `name` is not a relative path without ".."; so does `document`."""
        self._append({"kind": "artifact", "path": _artifact_path(name)}, png)

    def document(self, name: str, text: str) -> None:
        self._append({"kind": "artifact", "path": _artifact_path(name)}, text.encode())

    def finish(self, status: Status = "FINISHED", timeout_s: float = 10.0) -> bool:
        """Ends the run. A run without a parent also sends what is left, and returns as `Tracker.close` does."""
        self._append({"kind": "finish", "status": status})
        return self._tracker._end_root(self._key, timeout_s) if self._parent is None else True

    def _append(self, entry: Entry, attachment: bytes | None = None) -> None:
        self._tracker._append({**entry, "run": self._key}, attachment)


class _Delivery:
    """Turns journal entries into calls of MLflow's client, in the sender's thread."""

    def __init__(self, spec: TrackingSpec) -> None:
        self._spec = spec
        self._client: Any = None
        self._told_of_rejection: set[str] = set()
        self.experiment_id: str | None = None
        self.run_ids: dict[str, str] = {}

    def send(self, journal: Journal, entries: Sequence[Entry]) -> None:
        """Raises `Away`. What MLflow refuses for good is logged and dropped."""
        kind = entries[0]["kind"]
        if kind == "header":
            return
        rejection = self._attempt(lambda: self._send(journal, kind, entries))
        if rejection and len(parts := _parts(entries)) > 1:
            for part in parts:
                self.send(journal, [part])
        elif rejection:
            key: str = entries[0]["run"]
            level = logging.INFO if key in self._told_of_rejection else logging.WARNING
            self._told_of_rejection.add(key)
            logger.log(level, "MLflow refused %s of a run: %s", kind, rejection)

    def end_open_runs(self, journal: Journal) -> None:
        """Raises `Away`. Marks the journal's unfinished runs as KILLED, at the time of its last entry."""
        ended_ms = int(journal.path.stat().st_mtime * 1000)
        for key, run_id in journal.progress.ids.items():
            if key not in journal.progress.ended:
                self._attempt(functools.partial(self._terminate, run_id, "KILLED", ended_ms))

    def _attempt(self, action: Callable[[], None]) -> str | None:
        """The reason if MLflow refuses it for good. Raises `Away` if it can't be reached now."""
        where = f"MLflow at {without_password(self._spec.resolved_uri)} does not answer"
        try:
            mlflow_error = importlib.import_module("mlflow.exceptions").MlflowException
            database_errors = (
                importlib.import_module("sqlalchemy.exc").SQLAlchemyError,
                importlib.import_module("alembic.util").CommandError,
            )
        except ImportError as error:
            raise Away(f"MLflow can't be imported ({error})") from error
        try:
            self._connect()
            action()
        except mlflow_error as error:
            if error.error_code in REJECTED:
                return _reason(error)
            raise Away(f"{where} ({_reason(error)})") from error
        except (*database_errors, OSError) as error:
            raise Away(f"{where} ({_reason(error)})") from error
        return None

    def _connect(self) -> None:
        if self._client is not None:
            return
        mlflow = importlib.import_module("mlflow")
        with MIGRATIONS:
            client = mlflow.MlflowClient(self._spec.resolved_uri)
            experiment = client.get_experiment_by_name(self._spec.experiment)
        if experiment is None:
            self.experiment_id = client.create_experiment(self._spec.experiment, self._spec.artifact_location)
        else:
            if experiment.lifecycle_stage != "active":
                client.restore_experiment(experiment.experiment_id)
            self.experiment_id = experiment.experiment_id
        self._client = client

    def _send(self, journal: Journal, kind: str, entries: Sequence[Entry]) -> None:
        if kind == "run":
            for entry in entries:
                self._create_run(journal, entry)
            return
        run_id = journal.progress.ids.get(entries[0]["run"])
        if run_id is None:
            logger.info("dropped %d %s of a run that MLflow refused", len(entries), kind)
        elif kind == "metrics":
            self._log_metrics(run_id, entries)
        else:
            for entry in entries:
                if kind == "params":
                    self._log_params(run_id, entry)
                elif kind == "artifact":
                    self._log_artifact(journal, run_id, entry)
                elif kind == "finish":
                    self._terminate(run_id, entry["status"], entry["time_ms"])
                    journal.progress.ended.append(entry["run"])

    def _create_run(self, journal: Journal, entry: Entry) -> None:
        """Also finds a run that was created before, but whose id was lost on the way back."""
        key = entry["run"]
        tags = dict(entry["tags"])
        if parent := journal.progress.ids.get(entry["parent"] or ""):
            tags["mlflow.parentRunId"] = parent
        found = self._client.search_runs([self.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{key}'", max_results=1)
        run = found[0] if found else self._client.create_run(self.experiment_id, entry["time_ms"], tags, entry["name"])
        journal.progress.ids[key] = self.run_ids[key] = run.info.run_id

    def _log_metrics(self, run_id: str, entries: Sequence[Entry]) -> None:
        metric = importlib.import_module("mlflow.entities").Metric
        metrics = [
            metric(name, value, entry["time_ms"], entry["step"])
            for entry in entries
            for name, value in entry["values"].items()
        ]
        for batch in _batches(metrics, MAX_METRICS_PER_BATCH):
            self._client.log_batch(run_id, metrics=batch)

    def _log_params(self, run_id: str, entry: Entry) -> None:
        param = importlib.import_module("mlflow.entities").Param
        for batch in _batches([param(name, value) for name, value in entry["values"].items()], MAX_PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=batch)

    def _log_artifact(self, journal: Journal, run_id: str, entry: Entry) -> None:
        path = journal.attached(entry["file"])
        if not path.exists():
            logger.info("%s was sent before", entry["path"])
            return
        folder = str(PurePosixPath(entry["path"]).parent)
        self._client.log_artifact(run_id, str(path), None if folder == "." else folder)
        path.unlink()

    def _terminate(self, run_id: str, status: str, ended_ms: int) -> None:
        self._client.set_terminated(run_id, status, ended_ms)


def without_password(uri: str) -> str:
    """A URI, or a text with URIs, as it may be shown: without the user and password of scheme://user:password@host."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", uri)


def _set_mlflow_environment() -> None:
    """Before MLflow is imported. A person's own choice of timeouts and levels stays."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    # The sender tries again by itself, and should notice soon that there is no answer.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def _safe_name(name: str) -> str:
    """MLflow takes letters, digits, and _-.:/ and spaces, at most 250, and no path that isn't plain."""
    name = re.sub(r"[^\w\-.:/ ]", "_", name, flags=re.ASCII)[:MAX_NAME_LENGTH]
    parts = [part for part in name.split("/") if part not in {"", ".", ".."}]
    return "/".join(parts) or "_"


def _shortened(value: str, limit: int) -> str:
    if len(value) <= limit:
        return value
    remark = f"… [{len(value):,} characters]"
    return value[: limit - len(remark)] + remark


def _artifact_path(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(f"artifact name {name!r} must be a relative path without '..', such as samples/grid.png")
    return str(path)


def _parts(entries: Sequence[Entry]) -> list[Entry]:
    """The same with one value each: MLflow refuses a batch as a whole for one value in it."""
    return [
        {**entry, "values": {name: value}} if "values" in entry else entry
        for entry in entries
        for name, value in entry.get("values", {None: None}).items()
    ]


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _reason(error: BaseException) -> str:
    """An error's first line, short enough for a terminal; those of HTTP clients hold the URL, with its password."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return _shortened(without_password(line), MAX_REASON_LENGTH)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
