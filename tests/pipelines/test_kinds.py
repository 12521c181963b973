"""Kinds of model: every table has all of them, and one more needs a row in each and nothing else."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import channel_means
import pytest
from channel_means import KIND, ROWS, MeansModel, add_kind, read_recipe
from rich.console import Console

from infra.storage import Store
from pipelines.artifacts import Artifact
from pipelines.building import building
from pipelines.recipe import Model, model_checks
from pipelines.recipe.checks import check_recipe
from pipelines.recipe.errors import InvalidRecipe
from pipelines.recipe.kinds import KINDS
from pipelines.terminal.status import print_status, status_json
from pipelines.train.steps import time_steps
from pipelines.workflow.graph import Node, build_graph
from pipelines.workflow.here import check_here
from pipelines.workflow.kinds import KINDS as NODES
from pipelines.workflow.plan import plan

TABLES = {module.__name__: module.KINDS for module in ROWS}
ROOMS = TABLES | {model_checks.__name__: model_checks.CHECKS}


# -- the tables --------------------------------------------------------------------------------------------------------


def test_the_recipe_s_table_and_its_union_have_the_same_kinds() -> None:
    blocks = get_args(get_args(Model)[0])
    assert {row.block for row in KINDS.values()} == set(blocks)
    for kind, row in KINDS.items():
        assert get_args(row.block.model_fields["kind"].annotation) == (kind,)


def test_the_rooms_that_have_tables_are_those_that_are_looked_at() -> None:
    """A room that gets a table later is seen by the next test too."""
    import pipelines

    (root,) = pipelines.__path__
    found = {f"pipelines.{path.parent.name}.{path.stem}" for path in Path(root).glob("*/kinds*")}
    assert found == TABLES.keys()


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_no_table_lacks_a_kind_that_a_recipe_may_have(room: str) -> None:
    assert ROOMS[room].keys() == KINDS.keys()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_rooms_agree_on_what_is_released(kind: str) -> None:
    released = TABLES["pipelines.release.kinds"][kind]
    assert KINDS[kind].is_released == (NODES[kind].released is not None) == (released is not None)


# -- a fourth kind -----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a recipe with a model of the fourth kind, in the working folder."""
    add_kind(monkeypatch.setitem)
    monkeypatch.chdir(tmp_path)
    Path("urls.csv").write_text("url,caption\nhttps://example.org/1.png,one\n")
    train = {"steps": 2, "global_batch_size": 8, "lanes": 4, "precision": "fp32"}
    train["optimizer"] = {"learning_rate": 0.05, "warmup_steps": 0}
    value = {
        "name": "means",
        "source": {"kind": "urls", "files": ["urls.csv"]},
        "acquire": {"fetch": {"contact": "https://a.example/crawler"}},
        "report": False,
        "models": {"means": {"kind": KIND, "start": 0.5, "train": train}},
        "execution": {"device": "cpu", "cpus": 1, "log_every_steps": 1},
        "store": str(tmp_path / "store"),
        "state_dir": str(tmp_path / "state"),
    }
    Path("recipe.json").write_text(json.dumps(value))
    return tmp_path / "recipe.json"


def changed(recipe: Path, **fields: Any) -> Path:
    value = json.loads(recipe.read_text())
    value["models"]["means"] |= fields
    recipe.write_text(json.dumps(value))
    return recipe


def republished(store: Store, node: Node, artifact: Artifact, inputs: dict[str, Artifact]) -> Artifact:
    with building(store, node.name, node.identity, inputs, {}, node.format_version) as build:
        return build.publish(artifact.units, info=artifact.info)


def test_its_block_is_checked_as_its_row_says(recipe: Path) -> None:
    check_recipe(read_recipe(recipe))
    with pytest.raises(InvalidRecipe, match=r"models\.means\.start: 2: a mean is from 0 to 1"):
        check_recipe(read_recipe(changed(recipe, start=2.0)))


def test_its_key_is_made_of_what_decides_over_its_weights(recipe: Path) -> None:
    def content(**fields: Any) -> Any:
        return build_graph(read_recipe(changed(recipe, **fields)))["train.means"].identity.content

    before = content()
    assert before["kind"] == KIND
    assert content(preview_as="words") == before
    assert content(start=0.25) != before


def test_its_step_is_timed(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.train.steps.ROUNDS", 2)
    assert set(time_steps(read_recipe(recipe), "means").seconds) == {"fp32", "bf16"}


def test_it_is_planned_trained_and_shown_as_the_others_are(recipe: Path, published: Any) -> None:
    asked, store = read_recipe(recipe), published.store
    assert isinstance(asked.models["means"], MeansModel)
    nodes = build_graph(asked)
    assert list(nodes) == ["acquire", "select", "train.means"]
    acquired = published.acquire()
    inputs = {"acquire": republished(store, nodes["acquire"], acquired, {})}
    inputs["select"] = republished(store, nodes["select"], published.select(acquired), inputs)
    rows = plan(nodes, store, asked.name)
    assert [row.state for row in rows] == ["up to date", "up to date", "to do"]
    assert check_here(asked, rows, store) == []  # of pairs, lanes and packages

    done = subprocess.run(
        [sys.executable, channel_means.__file__, str(recipe)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr

    rows = plan(nodes, store, asked.name)
    assert [row.state for row in rows] == ["up to date"] * 3
    trained = rows[-1].artifact
    assert trained is not None
    assert trained.info["steps"] == 2
    means = json.loads(store.read_bytes(trained.units[0].path("means.json")))
    assert len(means) == 3
    assert all(0.01 < abs(mean - 0.5) < 0.11 for mean in means)  # two steps of AdamW, each of the learning rate
    assert status_json(rows, store, asked)["nodes"]["train.means"]["metrics"]["channel_0/train"] == pytest.approx(
        means[0]
    )
    shown = io.StringIO()
    print_status(rows, store, Console(file=shown, width=200))
    assert "train.means" in shown.getvalue()
    assert "2 steps" in shown.getvalue()
