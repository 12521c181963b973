"""A scorer and a sampler of one outside file through the whole line, on Ray's workers and in a training's process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plugged import PLUGIN, write_plugin
from tiny import TinyRecipe, free_port

from infra.storage import Store
from pipelines.artifacts import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyRecipe:
    recipe = TinyRecipe(tmp_path_factory.mktemp("plugins"), free_port())
    del recipe.settings["select.where.3.value"]
    recipe.settings |= {
        "plugins": '["mine.py"]',  # seen from the folder that the command is called in, as quickstart is no file
        "score.scorers": "{brightness: {}}",
        "select.where.3": "{name: dark, column: brightness, op: '>=', value: 0.7}",
        "models.base.sampling.sampler": "own_euler",
        "models.base.train.steps": 4,
        "models.autoencoder.train.steps": 4,
        "models.clip.train.steps": 2,
        "models.judge.train.steps": 2,
        "models.base.evaluate.untrained": "false",
        "execution.sample_every_steps": 4,  # previews sample too
    }
    write_plugin(recipe.folder)
    done = recipe.ldm(timeout_s=900)
    assert done.returncode == 0, done.stdout
    return recipe


def made(recipe: TinyRecipe) -> set[str]:
    """Nodes that the last run made."""
    command = [sys.executable, "-m", "pipelines.cli", "runs", "quickstart", *recipe.arguments("--json", "--last", "1")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=recipe.folder)
    (run,) = json.loads(done.stdout)
    return {node["node"] for node in run["nodes"] if node["made"]}


def node(recipe: TinyRecipe, name: str) -> Any:
    return load(Store(recipe.store), name, recipe.status()[name]["revision"])


def test_a_rule_uses_the_plugins_column_and_pictures_its_sampler(finished: TinyRecipe) -> None:
    dropped = finished.status()["select"]["counts"]["dropped"]
    assert dropped["dark"] > 0
    assert finished.status()["select"]["counts"]["kept"] > 0
    evaluated = node(finished, "evaluate.base")
    samples = Store(finished.store).read_json(evaluated.units[0].path("samples.json"))
    assert "own_euler" in json.dumps(samples)
    assert finished.ldm().stdout.count("nothing was to do") == 1


def test_the_files_change_remakes_what_uses_its_names(finished: TinyRecipe) -> None:
    """`select` and `report` read the scores, which are known by what made them; what `select` chose is the same, so
    that nothing is encoded or trained anew."""
    before = finished.status()
    write_plugin(finished.folder, PLUGIN + "# of no consequence\n")
    plan = finished.ldm("--dry-run").stdout
    assert "plugin_sha256" in next(line for line in plan.splitlines() if line.strip().startswith("score"))
    done = finished.ldm(timeout_s=900)
    assert done.returncode == 0, done.stdout
    assert {"score", "evaluate.base"} <= made(finished) <= {"score", "select", "report", "evaluate.base", "release"}
    after = finished.status()
    for name in ("acquire", "select", "encode.base", "train.base", "train.autoencoder", "train.clip"):
        assert after[name]["revision"] == before[name]["revision"]


def test_a_release_samples_with_the_recipes_sampler(finished: TinyRecipe, tmp_path: Path) -> None:
    done = finished.ldm(
        *("--prompt", "flag of Japan", "--out", str(tmp_path), "--sampler", "own_euler", "--steps", "2"),
        command="sample",
        timeout_s=300,
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "00000.png").is_file()


def test_without_its_plugin_the_recipe_is_refused(finished: TinyRecipe) -> None:
    done = finished.ldm("--set", "plugins=[]", "--dry-run")
    assert done.returncode == 2
    assert "own_euler" in done.stdout
    assert "brightness" in done.stdout
