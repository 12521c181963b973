"""`ldm runs`, as a person and as a program reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from made import MadeRecipe
from typer.testing import CliRunner

from pipelines.commands.runs import runs
from pipelines.errors import LatentworksError
from pipelines.workflow.records import recorded_run

app = typer.Typer()
app.command()(runs)


def ldm_runs(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.fixture
def made(tmp_path: Path) -> MadeRecipe:
    """Three runs: one that failed, one that was interrupted, one that is done."""
    recipe = MadeRecipe(tmp_path)
    with (
        pytest.raises(LatentworksError),
        recorded_run(recipe.store, "small", ["source.files=[x.csv]"], "select", ["acquire"], ["timeout"]),
    ):
        raise LatentworksError("x.csv is \x1b[31mnot there\nsecond line")
    with pytest.raises(KeyboardInterrupt), recorded_run(recipe.store, "small", []):
        raise KeyboardInterrupt
    artifacts = recipe.make()
    with recorded_run(recipe.store, "small", []) as recorder:
        for name, artifact in artifacts.items():
            recorder.have(name, artifact, made=name != "select")
        recorder.have("release", artifacts["select"], made=False)
    return recipe


def test_the_newest_run_is_last_and_each_says_what_came_of_it(made: MadeRecipe) -> None:
    out = ldm_runs(made.file)
    places = [out.index(state) for state in ("failed", "interrupted", "done")]
    assert places == sorted(places)
    words = " ".join(out.split())
    assert "--set 'source.files=[x.csv]' --force acquire --retry timeout --until select" in words
    assert "error: x.csv is [31mnot there" in words
    assert "second line" not in words
    assert "\x1b" not in out
    assert "made acquire, train.autoencoder" in words
    (latest,) = json.loads(ldm_runs(made.file, "--json", "--last", "1"))
    assert latest["release"][:12] in out


def test_programs_read_the_same(made: MadeRecipe) -> None:
    found = json.loads(ldm_runs(made.file, "--json"))
    assert [run["state"] for run in found] == ["failed", "interrupted", "done"]
    assert found[0]["overrides"] == ["source.files=[x.csv]"]
    assert found[2]["made"] == ["acquire", "train.autoencoder"]
    assert [node["node"] for node in found[2]["nodes"]] == ["acquire", "select", "train.autoencoder", "release"]


def test_only_so_many(made: MadeRecipe) -> None:
    assert [run["state"] for run in json.loads(ldm_runs(made.file, "--json", "--last", "2"))] == ["interrupted", "done"]


def test_a_recipe_that_was_never_run(made: MadeRecipe, tmp_path: Path) -> None:
    assert ldm_runs(made.file, "--set", f"store={tmp_path / 'new'}").startswith("no run of small is on record in")
    assert json.loads(ldm_runs(made.file, "--set", f"store={tmp_path / 'new'}", "--json")) == []
