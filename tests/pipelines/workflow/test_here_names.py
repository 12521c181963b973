"""What extractors and scorers by name need of this machine is told before any work."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from plugged import PLUGIN, no_plugins_left, write_plugin

from infra.storage import Store
from pipelines.errors import EXIT_FAILED, EXIT_USAGE
from pipelines.recipe import Recipe
from pipelines.recipe.file import load_recipe
from pipelines.results import Row
from pipelines.workflow.graph import build_graph
from pipelines.workflow.here import NotHere, check_here

WITH_A_FILE = PLUGIN.replace(
    "    scale: float = 1.0",
    "    scale: float = 1.0\n    weights: WeightsPath = 'nothing'",
).replace("import Block", "import WeightsPath, Block")


@pytest.fixture(autouse=True)
def _built_in_alone() -> Iterator[None]:
    with no_plugins_left():
        yield


def recipe_at(folder: Path, *overrides: str) -> Recipe:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    return load_recipe(
        "quickstart", [f"store={folder / 'store'}", f"state_dir={folder / 'state'}", f"source.port={port}", *overrides]
    )


def refused(recipe: Recipe) -> NotHere:
    rows = [Row(node, "to do", "not made yet", "0" * 32) for node in build_graph(recipe)]
    with pytest.raises(NotHere) as told:
        check_here(recipe, rows, Store(recipe.store))
    return told.value


@pytest.mark.parametrize("key", ["score.features", "models.base.evaluate.extractor", "execution.extractor"])
@pytest.mark.parametrize("kind", ["inception", "clip", "dinov2"])
def test_weights_that_are_not_there_are_named(key: str, kind: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    error = refused(recipe_at(tmp_path, f"{key}='{kind}:{gone}'"))
    assert f"{key}: '{gone}' is not there; give the path of {kind}'s weights" in str(error)
    assert error.exit_code == EXIT_USAGE


def test_weights_that_are_there_are_no_matter(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    recipe = recipe_at(
        tmp_path, *(f"{key}='dinov2:{tmp_path / 'there'}'" for key in ("score.features", "execution.extractor"))
    )
    rows = [Row(node, "to do", "not made yet", "0" * 32) for node in build_graph(recipe)]
    assert check_here(recipe, rows, Store(recipe.store)) == []


def test_the_package_of_inception_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    (tmp_path / "weights.pth").touch()
    error = refused(recipe_at(tmp_path, f"models.base.evaluate.extractor='inception:{tmp_path / 'weights.pth'}'"))
    assert "models.base.evaluate.extractor: needs torch_fidelity, not installed here: pip install torch-fide" in str(
        error
    )
    assert error.exit_code == EXIT_FAILED


def test_what_a_plugins_scorer_needs_is_asked_for(tmp_path: Path) -> None:
    text = WITH_A_FILE.replace("options=Options", "options=Options, needs=['nothing_like_this']")
    write_plugin(tmp_path, text)
    recipe = recipe_at(
        tmp_path, f"plugins=[{tmp_path / 'mine.py'}]", f"score.scorers={{brightness: {{weights: {tmp_path / 'gone'}}}}}"
    )
    message = str(refused(recipe))
    assert "score.scorers.brightness: needs nothing_like_this, not installed here" in message
    assert f"score.scorers.brightness.weights: '{tmp_path / 'gone'}' is not there" in message
