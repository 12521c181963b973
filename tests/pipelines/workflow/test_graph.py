"""The graph of a recipe: what is made of what, and what each node's key is made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.errors import WrongUsage
from pipelines.recipe.errors import RecipeError
from pipelines.recipe.file import load_recipe
from pipelines.workflow.graph import build_graph


def test_scores_come_before_selection_and_the_judge_does_not_score() -> None:
    nodes = build_graph(load_recipe("quickstart", []))
    assert nodes["score"].inputs == ("acquire", "train.clip")
    assert nodes["select"].inputs == ("acquire", "score")
    assert "train.judge" in nodes["evaluate.base"].inputs
    order = list(nodes)
    assert order.index("train.clip") < order.index("score") < order.index("select") < order.index("report")


def test_a_clip_without_a_split_of_its_own_learns_from_what_select_does_not_hold_out() -> None:
    recipe = load_recipe("quickstart", ["select.split.salt=other"])
    nodes = build_graph(recipe)
    assert nodes["train.clip"].identity.content["split"]["salt"] == "other"
    assert nodes["train.judge"].identity.content["split"]["salt"] == "judge"
    assert recipe.model("clip").split == recipe.select.split


def test_a_recipe_without_scores_and_report_has_no_such_nodes() -> None:
    nodes = build_graph(load_recipe("autoencoder", []))
    assert list(nodes) == ["acquire", "select", "train.autoencoder"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models.base.evaluate.judge=clip", "'clip' is also score.clip"),
        ("models.base.evaluate.judge=autoencoder", "is no clip model of this recipe"),
        ("score.clip=nobody", "is no clip model of this recipe"),
        ("score.phash=false", "needs the columns of score.phash"),
    ],
)
def test_models_and_scores_that_do_not_fit_are_refused(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", [override])


def test_the_graph_follows_from_the_recipe_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists, weights and folders need not be there before a key is asked for."""
    monkeypatch.chdir(tmp_path)
    overrides = ['source={kind: urls, files: ["absent.csv"]}', "score.clip=./absent"]
    nodes = build_graph(load_recipe("quickstart", overrides))
    assert nodes["evaluate.base"].inputs
    with pytest.raises(WrongUsage, match=r"absent\.csv"):
        nodes["acquire"].key({})
