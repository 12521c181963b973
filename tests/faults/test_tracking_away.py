"""MLflow's database is locked while a recipe runs: the run goes on, and the next one delivers what it reported."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from tiny import TinyRecipe, free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # MLflow 3.17 maps its tables in a way that SQLAlchemy 2.1 gives up.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),
]


def runs(database: Path) -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{database}")
    experiment = client.get_experiment_by_name("quickstart")
    return list(client.search_runs([experiment.experiment_id]))


def test_a_locked_database_delays_what_a_run_reports(tmp_path: Path) -> None:
    recipe = TinyRecipe(tmp_path, free_port())
    state = tmp_path / "state"
    assert recipe.ldm("--until", "acquire").returncode == 0
    before = len(runs(state / "mlflow.db"))

    holder = sqlite3.connect(state / "mlflow.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    done = recipe.ldm("--until", "select")
    holder.execute("ROLLBACK")
    holder.close()
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("sent later") == 1
    assert any((state / "spool").glob("*.jsonl"))
    assert len(runs(state / "mlflow.db")) == before

    assert recipe.ldm("--until", "select", "--force", "select").returncode == 0
    assert not any((state / "spool").iterdir())
    selects = [run for run in runs(state / "mlflow.db") if run.data.tags.get("node") == "select"]
    kept = recipe.status()["select"]["counts"]["kept"]
    assert [(run.info.status, run.data.metrics["counts/kept"]) for run in selects] == [("FINISHED", kept)] * 2
    assert selects[0].info.start_time > selects[1].info.end_time  # each at its own time
