"""A fresh MLflow database, made once: importing MLflow and creating all tables takes seconds."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.tracking import Tracker, TrackingSpec


@dataclass
class FreshDatabase:
    path: Path
    there_at_start: bool


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> FreshDatabase:
    folder = tmp_path_factory.mktemp("mlflow")
    run = Tracker(TrackingSpec(None, "first", folder)).start_run("first")
    run.metrics({"loss": 1.0}, 1)
    there_at_start = (folder / "mlflow.db").exists()
    assert run.finish(timeout_s=120)
    return FreshDatabase(folder / "mlflow.db", there_at_start)


@pytest.fixture
def spec(tmp_path: Path, fresh_database: FreshDatabase) -> TrackingSpec:
    shutil.copy(fresh_database.path, tmp_path / "mlflow.db")
    return TrackingSpec(None, tmp_path.name, tmp_path)


@pytest.fixture
def client(spec: TrackingSpec) -> Any:
    import mlflow

    return mlflow.MlflowClient(spec.resolved_uri)
