"""Plan and status at every width of a terminal, and in JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from filled import filled
from rich.console import Console

from infra.storage import Store
from pipelines.acquire.record import MANNERS, manners_of
from pipelines.commands.status import curable_rows, show_status
from pipelines.recipe import Recipe
from pipelines.recipe.file import load_recipe
from pipelines.results import Asked, Row
from pipelines.terminal.status import print_curable, print_plan, print_status
from pipelines.terminal.tables import Column, print_table
from pipelines.workflow.graph import build_graph
from pipelines.workflow.plan import plan
from pipelines.workflow.records import recorded_run

RECIPE = """
name: mine
source: {kind: urls, files: [urls.csv]}
store: ./store
models:
  an_autoencoder_of_many_words:
    kind: autoencoder
    network: {block_out_channels: [8, 8], norm_num_groups: 4}
    train: {steps: 3}
"""
NODES = ("acquire", "select", "report", "train.an_autoencoder_of_many_words")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    Path("urls.csv").write_text("url,caption\nhttps://example.org/1.png,one\n")
    Path("mine.yaml").write_text(RECIPE)
    return load_recipe("mine.yaml")


def rows_of(recipe: Recipe) -> list[Row]:
    return plan(build_graph(recipe), Store(recipe.store), recipe.name)


def printed(show: Any, *arguments: Any, width: int) -> list[str]:
    stream = io.StringIO()
    show(*arguments, Console(file=stream, width=width))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [200, 120, 80, 60])
@pytest.mark.parametrize("made", [[], ["acquire"], NODES])
def test_no_name_is_broken_and_no_line_is_too_long(recipe: Recipe, width: int, made: list[str]) -> None:
    filled(recipe, made)
    for lines in (
        printed(print_plan, rows_of(recipe), width=width),
        printed(print_status, rows_of(recipe), Store(recipe.store), width=width)[:-1],  # the store's place may be long
    ):
        assert max(map(len, lines)) <= width
        starts = [line.split()[0] for line in lines if not line.startswith(" ")]
        assert sorted(starts) == sorted(["node", *NODES])
        for line in lines[1:]:
            if not line.startswith(" "):
                assert any(f"  {state}" in line for state in ("to do", "waiting", "up to date"))


def test_why_a_node_is_not_up_to_date_is_told_at_any_width(recipe: Recipe) -> None:
    filled(recipe)
    changed = load_recipe("mine.yaml", ["select.split.held_out=0.25", "select.split.salt=another"])
    for width in (160, 80, 60):
        text = " ".join(" ".join(printed(print_status, rows_of(changed), Store(recipe.store), width=width)).split())
        assert "changed: split.held_out 0.05 -> 0.25, split.salt split -> another" in text


def test_columns_go_in_their_order_and_a_name_never() -> None:
    columns = (Column("node"), Column("a", keep=2), Column("b", right=True, keep=1), Column("c", keep=3))
    rows = [("x" * 20, "aaaa", "bbbb", "cccc"), ("y", "", "7", "")]

    def table(width: int) -> list[str]:
        return printed(lambda console: print_table(console, columns, rows), width=width)

    assert table(40)[1:] == ["x" * 20 + "  aaaa  bbbb  cccc", "y" + " " * 19 + "           7"]
    assert table(34)[0].split() == ["node", "a", "c"]
    assert table(28)[0].split() == ["node", "c"]
    assert table(24)[0].split() == ["node"]
    assert table(10)[1:] == ["x" * 20, "y"]
    assert printed(lambda console: print_table(console, columns, []), width=80) == ["node  a  b  c"]


def test_words_go_beside_their_row_or_below_it() -> None:
    words = "one two three four five six seven eight nine ten"

    def table(width: int) -> list[str]:
        return printed(
            lambda console: print_table(console, [Column("node")], [("acquire",)], [words], "why"), width=width
        )

    assert table(80) == ["node     why", f"acquire  {words}"]
    assert table(40) == ["node     why", "acquire  one two three four five six", "         seven eight nine ten"]
    assert table(30) == ["node", "acquire", "    one two three four five", "    six seven eight nine ten"]


def test_rows_that_may_be_had_now_are_named_with_the_command(recipe: Recipe) -> None:
    fault = {
        "settings": manners_of(recipe.acquire.fetch),
        "reasons": {"timeout": 1200, "not_found": 3},
        "transient": {},
    }
    filled(recipe, info={MANNERS: {"a": fault}})
    assert curable_rows(rows_of(recipe), recipe) == {}
    override = "acquire.fetch.timeout_s=60"
    patient = load_recipe("mine.yaml", [override])
    reasons = curable_rows(rows_of(patient), patient)
    assert reasons == {"timeout": 1200}
    (line,) = printed(print_curable, reasons, Asked("mine.yaml", (override,)), width=80)
    assert line.startswith(
        "acquire: 1,200 rows could not be had under settings that have changed since (timeout 1,200)"
    )
    assert line.endswith(f"ldm acquire mine.yaml --set {override} --retry timeout")
    assert printed(print_curable, {}, Asked("mine.yaml"), width=80) == []


def test_who_forgets_the_settings_of_the_latest_run_is_told_them(
    recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ("select.split.salt=an other",)
    with recorded_run(Store(recipe.store), "mine", overrides):
        pass
    hint = "the latest run had other settings: ldm status mine.yaml --set 'select.split.salt=an other'\n"
    show_status(recipe, Asked("mine.yaml"), as_json=False)
    assert hint in capsys.readouterr().out
    show_status(load_recipe("mine.yaml", overrides), Asked("mine.yaml", overrides), as_json=False)
    assert "other settings" not in capsys.readouterr().out
    filled(recipe)
    show_status(recipe, Asked("mine.yaml"), as_json=False)
    assert "other settings" not in capsys.readouterr().out


def test_status_for_programs(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    made = filled(recipe, ["acquire"])["acquire"]
    show_status(recipe, Asked("mine.yaml"), as_json=True)
    value = json.loads(capsys.readouterr().out)
    assert value["curable"] == {}
    assert value["nodes"]["acquire"]["revision"] == made.revision
    assert value["nodes"]["select"] | {"key": None} == {"state": "to do", "why": "not made yet", "key": None}
