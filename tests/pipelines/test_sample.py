"""What MODEL may be in `ldm sample`: here, a model of MLflow's registry."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.registry import ModelFacts, RegistryError
from infra.storage import Store
from infra.tracking import Tracker, TrackingSpec
from pipelines.artifacts import Counts, publish_unit
from pipelines.sample import UsageError, resolve_model

# MLflow 3.17 maps its tables in a way that SQLAlchemy 2.1 gives up.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


def test_a_registered_model_leads_to_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UsageError, match=r"no ldm-state/mlflow\.db here"):
        resolve_model("models:/quickstart@champion")

    store = Store(tmp_path / "store")
    publish_unit(store, "release", "abc", {"model_index.json": b"{}", "unet/config.json": b"{}"}, Counts(1, 1))
    run = Tracker(TrackingSpec(None, "quickstart", tmp_path / "ldm-state")).start_run("run")
    run.model(ModelFacts("a" * 32, store.location("release/units/abc"), "f" * 64))
    assert run.finish(timeout_s=120)

    folder = resolve_model("models:/quickstart@champion")
    assert folder == tmp_path / "store/release/units/abc"
    assert (folder / "model_index.json").is_file()
    with pytest.raises(RegistryError, match="no model 'quickstart' with alias 'best'"):
        resolve_model("models:/quickstart@best")
    with pytest.raises(UsageError, match="models:/NAME@ALIAS"):
        resolve_model("models:/quickstart/1")
    store.delete("release/units/abc")
    with pytest.raises(UsageError, match="where no model is"):
        resolve_model("models:/quickstart@candidate")
