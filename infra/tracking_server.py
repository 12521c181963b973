"""Where MLflow is and what it takes: its address, the connection, and names and values made fit for it.

MLflow is imported when a connection is made. Only `infra.tracking*` and `infra.registry` know it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Limits of MLflow 3 (mlflow.utils.validation).
MAX_NAME_LENGTH = 250
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
MAX_PARAMS_PER_BATCH = 100
MAX_METRICS_PER_BATCH = 1000
MAX_REASON_LENGTH = 300

Scalar = str | int | float | bool | None

DATABASE = "mlflow.db"

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
        return self.uri or f"sqlite:///{self.state_dir.resolve() / DATABASE}"

    @property
    def artifact_location(self) -> str | None:
        """Where the files of runs are kept. None leaves it to the server."""
        if self.resolved_uri.startswith(("http://", "https://")):
            return None
        return (self.state_dir.resolve() / "mlartifacts").as_uri()

    @property
    def target(self) -> str:
        """The server and experiment without a password: a journal is sent to the target it was written for."""
        return f"{without_password(self.resolved_uri)} {self.experiment}"


def connect(spec: TrackingSpec) -> tuple[Any, str]:
    """A client of MLflow, and the id of the experiment, which is made or restored where needed.

    Raises MLflow's, SQLAlchemy's and alembic's errors, and `ImportError`.
    """
    mlflow = importlib.import_module("mlflow")
    with MIGRATIONS:
        if spec.uri is None:
            _make_database(mlflow, spec.state_dir.resolve() / DATABASE)
        client = mlflow.MlflowClient(spec.resolved_uri)
        experiment = client.get_experiment_by_name(spec.experiment)
    if experiment is None:
        return client, client.create_experiment(spec.experiment, spec.artifact_location)
    if experiment.lifecycle_stage != "active":
        client.restore_experiment(experiment.experiment_id)
    return client, experiment.experiment_id


def _make_database(mlflow: Any, path: Path) -> None:
    """Under its name when it is whole: its many steps take seconds, and one left half-way is never gone on with."""
    if path.exists():
        return
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        mlflow.MlflowClient(f"sqlite:///{part}").get_experiment_by_name("Default")
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(part, path)
    finally:
        part.unlink(missing_ok=True)


def without_password(uri: str) -> str:
    """A URI, or a text with URIs, as it may be shown: without the user and password of scheme://user:password@host."""
    return re.sub(r"(?<=://)[^/@\s]*@", "", uri)


def set_mlflow_environment() -> None:
    """Before MLflow is imported. A person's own choice of timeouts and levels stays."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    # The sender tries again by itself, and should notice soon that there is no answer.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")


def safe_name(name: str) -> str:
    """MLflow takes letters, digits, and _-.:/ and spaces, at most 250, and no path that isn't plain."""
    name = re.sub(r"[^\w\-.:/ ]", "_", name, flags=re.ASCII)[:MAX_NAME_LENGTH]
    parts = [part for part in name.split("/") if part not in {"", ".", ".."}]
    return "/".join(parts) or "_"


def shortened(value: str, limit: int) -> str:
    if len(value) <= limit:
        return value
    remark = f"… [{len(value):,} characters]"
    return value[: limit - len(remark)] + remark


def reason(error: BaseException) -> str:
    """An error's first line, short enough for a terminal; those of HTTP clients hold the URL, with its password."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return shortened(without_password(line), MAX_REASON_LENGTH)
