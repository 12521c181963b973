"""The same tiny run with its store in S3: nothing but the URL of the store differs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import STAGES, TinyRecipe, free_port

from infra.storage import Store
from pipelines.artifacts import fetch_unit, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_run_in_s3_is_complete_and_its_model_comes_near(s3_url: str, tmp_path: Path) -> None:
    recipe = TinyRecipe(tmp_path, free_port(), store=s3_url)
    done = recipe.ldm(timeout_s=500)
    assert done.returncode == 0, done.stdout
    nodes = recipe.status()
    assert {stage: node["state"] for stage, node in nodes.items()} == dict.fromkeys(STAGES, "up to date")
    assert not (tmp_path / "ldm-store").exists()
    assert "nothing was to do" in recipe.ldm().stdout

    store = Store(s3_url)
    (unit,) = load(store, "release", nodes["release"]["revision"]).units
    folder = fetch_unit(store, unit)
    assert {"model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler"} <= {
        p.name for p in folder.iterdir()
    }
