"""What runs say of themselves, recorded in MLflow by one background thread.

Nothing here waits for MLflow or fails because of it. Each call is written to a journal (`infra.spool`) and returns; the
thread sends the journal on. While the database is locked or the server is away, the journal grows; what is left when
the process ends, or is killed, is sent by the next one, into the same runs and with the original times.
"""

from __future__ import annotations

import getpass
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Literal

from infra.registry import ModelFacts
from infra.spool import Entry, Journal, Sender
from infra.tracking_delivery import RUN_KEY_TAG, Delivery
from infra.tracking_models import EvaluationFacts, TrainingFacts
from infra.tracking_server import (
    MAX_PARAM_LENGTH,
    MAX_TAG_LENGTH,
    MIGRATIONS,
    Scalar,
    TrackingSpec,
    safe_name,
    set_mlflow_environment,
    shortened,
    without_password,
)

__all__ = ["MIGRATIONS", "RunHandle", "Status", "Tracker", "TrackingSpec"]

Status = Literal["FINISHED", "FAILED", "KILLED"]

logger = logging.getLogger(__name__)


class Tracker:
    """Records runs. One per process; MLflow is imported and its database made in the thread of the first run."""

    def __init__(self, spec: TrackingSpec) -> None:
        self.spec = spec
        self._changing = threading.Lock()
        self._sender: Sender | None = None
        self._delivery = Delivery(spec)
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
            **{safe_name(tag): shortened(value, MAX_TAG_LENGTH) for tag, value in tags.items()},
            RUN_KEY_TAG: key,
        }
        if parent is None:
            self._open_roots.add(key)
        self._append({"kind": "run", "run": key, "parent": parent, "name": safe_name(name), "tags": tags})
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
                set_mlflow_environment()
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
        fitting = {safe_name(name): shortened(str(value), MAX_PARAM_LENGTH) for name, value in values.items()}
        self._append({"kind": "params", "values": fitting})

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Without a step, MLflow shows them at step 0."""
        named = {safe_name(name): float(value) for name, value in values.items()}
        self._append({"kind": "metrics", "values": named, "step": step or 0})

    def figure(self, name: str, png: bytes) -> None:
        """Raises `ValueError` if `name` is not a relative path without ".."; so does `document`."""
        self._append({"kind": "artifact", "path": _artifact_path(name)}, png)

    def document(self, name: str, text: str) -> None:
        self._append({"kind": "artifact", "path": _artifact_path(name)}, text.encode())

    def model(self, facts: ModelFacts) -> None:
        """A released model, to be registered under the experiment's name: see `infra.registry.register`."""
        self._append({"kind": "model", "facts": facts.to_json()})

    def checkpoints(self, facts: TrainingFacts) -> None:
        """The checkpoints that are kept now of the training that this run is: each is a logged model."""
        self._append({"kind": "checkpoints", "facts": facts.to_json()})

    def evaluation(self, facts: EvaluationFacts) -> None:
        """Figures of a trained model, as metrics of this run that are linked to the model and to the data."""
        self._append({"kind": "evaluation", "facts": facts.to_json()})

    def finish(self, status: Status = "FINISHED", timeout_s: float = 10.0) -> bool:
        """Ends the run. A run without a parent also sends what is left, and returns as `Tracker.close` does."""
        self._append({"kind": "finish", "status": status})
        return self._tracker._end_root(self._key, timeout_s) if self._parent is None else True

    def _append(self, entry: Entry, attachment: bytes | None = None) -> None:
        self._tracker._append({**entry, "run": self._key}, attachment)


def _artifact_path(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.name:
        raise ValueError(f"artifact name {name!r} must be a relative path without '..', such as samples/grid.png")
    return str(path)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())
