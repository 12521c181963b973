"""A fresh MLflow database, made once: importing MLflow and creating all tables takes seconds."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from infra.tracking import Tracker, TrackingSpec


@dataclass
class FreshDatabase:
    path: Path
    start_s: float
    made_s: float


@pytest.fixture(scope="session")
def fresh_database(tmp_path_factory: pytest.TempPathFactory) -> FreshDatabase:
    folder = tmp_path_factory.mktemp("mlflow")
    began_s = time.monotonic()
    run = Tracker(TrackingSpec(None, "first", folder)).start_run("first")
    run.metrics({"loss": 1.0}, 1)
    start_s = time.monotonic() - began_s
    assert run.finish(timeout_s=120)
    return FreshDatabase(folder / "mlflow.db", start_s, time.monotonic() - began_s)


@pytest.fixture
def spec(tmp_path: Path, fresh_database: FreshDatabase) -> TrackingSpec:
    shutil.copy(fresh_database.path, tmp_path / "mlflow.db")
    return TrackingSpec(None, tmp_path.name, tmp_path)


@pytest.fixture
def client(spec: TrackingSpec) -> Any:
    import mlflow

    return mlflow.MlflowClient(spec.resolved_uri)
