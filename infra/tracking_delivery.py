"""Journal entries turned into calls of MLflow's client, in the sender's thread."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

from infra.registry import ModelFacts, register
from infra.spool import Away, Entry, Journal
from infra.tracking_models import EvaluationFacts, TrainingFacts, keep_checkpoints, link_figures
from infra.tracking_server import (
    MAX_METRICS_PER_BATCH,
    MAX_PARAMS_PER_BATCH,
    TrackingSpec,
    connect,
    reason,
    safe_name,
    without_password,
)

RUN_KEY_TAG = "latentworks.run_key"

# MLflow's codes for "this entry will never be accepted"; all else is taken for "not now".
REJECTED = {"INVALID_PARAMETER_VALUE", "INVALID_STATE", "RESOURCE_DOES_NOT_EXIST", "ENDPOINT_NOT_FOUND"}

logger = logging.getLogger(__name__)


class Delivery:
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
        if rejection and len(single := _single_values(entries)) > 1:
            for part in single:
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
                return reason(error)
            raise Away(f"{where} ({reason(error)})") from error
        except (*database_errors, OSError) as error:
            raise Away(f"{where} ({reason(error)})") from error
        return None

    def _connect(self) -> None:
        if self._client is None:
            self._client, self.experiment_id = connect(self._spec)

    @property
    def _experiment(self) -> str:
        assert self.experiment_id is not None, "there is a connection"
        return self.experiment_id

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
                elif kind == "model":
                    self._register(run_id, entry)
                elif kind == "checkpoints":
                    keep_checkpoints(self._client, self._experiment, run_id, TrainingFacts.from_json(entry["facts"]))
                elif kind == "evaluation":
                    facts = EvaluationFacts.from_json(entry["facts"])
                    link_figures(self._client, self._experiment, run_id, facts, entry["time_ms"])
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

    def _register(self, run_id: str, entry: Entry) -> None:
        facts = ModelFacts.from_json(entry["facts"])
        version = register(
            self._client, self._experiment, run_id, safe_name(self._spec.experiment), facts, entry["time_ms"]
        )
        logger.info("model %s is version %s of %s", facts.revision, version, self._spec.experiment)

    def _terminate(self, run_id: str, status: str, ended_ms: int) -> None:
        self._client.set_terminated(run_id, status, ended_ms)


def _single_values(entries: Sequence[Entry]) -> list[Entry]:
    """The same with one value each: MLflow refuses a batch as a whole for one value in it."""
    return [
        {**entry, "values": {name: value}} if "values" in entry else entry
        for entry in entries
        for name, value in entry.get("values", {None: None}).items()
    ]


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
