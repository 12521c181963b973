"""Kinds of sources: two tables, a kind more through both of them, and several sources in one recipe."""

from __future__ import annotations

import csv
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import memory_source
import pyarrow as pa
import pytest
from pydantic import Field, create_model

from infra.storage import Store
from pipelines.acquire.errors import SourceError
from pipelines.acquire.sources import SOURCES as ROWS
from pipelines.acquire.sources import rows_of_source
from pipelines.artifacts import Artifact
from pipelines.dataset.acquired import acquired_of
from pipelines.dataset.facts import source_facts
from pipelines.dataset.funnel import funnel
from pipelines.dataset.ledgers import read_ledger
from pipelines.dataset.selection import read_dropped, read_selection
from pipelines.recipe import Execution, Recipe
from pipelines.recipe.checks import check_recipe
from pipelines.recipe.errors import InvalidRecipe
from pipelines.recipe.file import checked_recipe
from pipelines.recipe.sources import SOURCES as BLOCKS
from pipelines.recipe.sources import any_source
from pipelines.reporting import LogReport
from pipelines.results import Row
from pipelines.workflow.graph import build_graph
from pipelines.workflow.here import check_here
from pipelines.workflow.plan import plan

COLOURS = {"a red square": "#ff0000", "a green square": "#00ff00", "a blue square": "#0000ff", "none": "#no"}


def test_both_tables_have_the_same_kinds() -> None:
    assert BLOCKS.keys() == ROWS.keys()
    assert {name: get_args(block.model_fields["kind"].annotation) for name, block in BLOCKS.items()} == {
        name: (name,) for name in BLOCKS
    }


@pytest.fixture
def with_colours(monkeypatch: pytest.MonkeyPatch) -> type[Recipe]:
    """The recipe of a program that knows one kind of source more, which workers get with its readers."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(memory_source)
    memory_source.register(monkeypatch.setitem)
    source = any_source()
    return create_model(
        "Recipe",
        __base__=Recipe,
        source=(source | None, None),
        sources=(dict[str, source], Field(default_factory=dict)),  # type: ignore[valid-type]
    )


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "acquire": {
            "fetch": {"contact": "me@latentworks.dev", "timeout_s": 5.0, "attempts": 1},
            "image": {"size_px": 16, "encode_format": "png", "encode_quality": 3},
        },
        "models": {},
        "report": False,
        "store": str(folder / "store"),
        "state_dir": str(folder / "state"),
        **changes,
    }


def test_a_kind_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("name: small\nsource: {kind: url, files: [a.csv]}\nmodels: {}\n")
    with pytest.raises(InvalidRecipe, match=r"source\.kind.*one of gallery, urls, folder.*did you mean 'urls'"):
        checked_recipe(str(path))
    path.write_text("name: small\nsources: {web: {files: [a.csv]}}\nmodels: {}\n")
    with pytest.raises(InvalidRecipe, match=r"sources\.web\.kind.*one of gallery, urls, folder"):
        checked_recipe(str(path))


def test_a_block_without_rows_is_told(with_colours: type[Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(ROWS, "colours")
    with pytest.raises(SourceError, match="'colours' can't be acquired; there are folder, gallery, urls"):
        rows_of_source(memory_source.ColoursSource(kind="colours", colours=COLOURS))


# -- a kind more, through checks, graph and stage ----------------------------------------------------------------------


def made(recipe: Recipe, *until: str) -> dict[str, Artifact]:
    """What the nodes publish, one after another; all of them without names."""
    found: dict[str, Artifact] = {}
    for node in build_graph(recipe).values():
        if not until or node.name.partition(".")[0] in until:
            inputs = {name: found[name] for name in node.inputs}
            found[node.name] = node.run(inputs, Store(recipe.store), LogReport(), Execution())
    return found


def test_a_kind_more_is_checked_and_acquired(local_ray: None, with_colours: type[Recipe], tmp_path: Path) -> None:
    empty = with_colours.model_validate(settings(tmp_path, source={"kind": "colours", "colours": {}}))
    with pytest.raises(InvalidRecipe, match=r"source\.colours: there are none; give some"):
        check_recipe(empty)
    rule = {"name": "not_red", "column": "colour", "op": "!=", "value": "#ff0000"}
    recipe = with_colours.model_validate_json(
        json.dumps(settings(tmp_path, source={"kind": "colours", "colours": COLOURS}, select={"where": [rule]}))
    )
    assert check_recipe(recipe) == []
    assert check_here(recipe, [Row("acquire", "to do", "", "0" * 32)], Store(recipe.store)) == []
    found = made(recipe)
    counts = found["acquire"].counts
    assert (counts.total, counts.kept, counts.failed) == (4, 3, {"unreadable": 1})
    assert found["select"].counts.dropped == {"not_red": 1}
    (unit,) = found["acquire"].units
    assert read_ledger(unit, Store(recipe.store), ["colour"]).column("colour").to_pylist() == list(COLOURS.values())
    assert [row.state for row in plan(build_graph(recipe), Store(recipe.store), "small")] == ["up to date"] * 2


# -- several sources ---------------------------------------------------------------------------------------------------


class Site:
    """Pages on loopback, each a square of the colour in its path. `asked` are the paths of all requests."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                body = memory_source.Palette().fetch("colour:#" + self.path.strip("/").partition("-")[0]).body or b""
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Not to the terminal."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://{self.host}/{name}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    yield server
    server.close()


def listed(path: Path, rows: list[tuple[str, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("url", "caption"), *rows])
    return str(path)


@pytest.fixture
def two(with_colours: type[Recipe], site: Site, tmp_path: Path) -> Any:
    """A recipe with a list and a palette: of the list, one pair is the palette's blue again, bit for bit."""
    listed(tmp_path / "list.csv", [(site.url(f"{n}0{n}0{n}0"), f"grey {n}") for n in range(1, 5)])
    with (tmp_path / "list.csv").open("a") as file:
        file.write(f"{site.url('0000ff')},blue of the web\n")

    def recipe(**select: Any) -> Recipe:
        changed = settings(
            tmp_path,
            sources={
                "web": {"kind": "urls", "files": [str(tmp_path / "list.csv")]},
                "palette": {"kind": "colours", "colours": COLOURS, "weight": 2.5},
            },
            select={"split": {"held_out": 0.0}, **select},
        )
        changed["acquire"]["fetch"]["allow_hosts"] = [site.host]
        return with_colours.model_validate_json(json.dumps(changed))

    return recipe


def test_two_sources_join_at_the_selection(local_ray: None, two: Any, site: Site) -> None:
    recipe = two()
    notes = check_recipe(recipe)
    assert [note.partition(":")[0] for note in notes] == ["sources.palette.weight"]
    nodes = build_graph(recipe)
    assert list(nodes) == ["acquire.web", "acquire.palette", "select"]
    found = made(recipe)
    store, acquired = Store(recipe.store), acquired_of(found)
    assert {name: artifact.counts.kept for name, artifact in acquired.artifacts.items()} == {
        "acquire.web": 5,
        "acquire.palette": 3,
    }
    assert acquired.counts.total == 9
    selected = found["select"]
    assert selected.counts.total == acquired.counts.kept == 8
    assert selected.counts.dropped == {"duplicate_sha256": 1}  # the blue one, which both have
    assert [(step.node, step.total, step.kept) for step in funnel(found).steps] == [
        ("acquire.web", 5, 5),
        ("acquire.palette", 4, 3),
        ("select", 8, 7),
    ]
    facts = source_facts(selected)
    assert {name: (own.weight, own.pairs) for name, own in facts.items()} == {"web": (1.0, 5), "palette": (2.5, 3)}
    assert sum(own.train for own in facts.values()) == 7
    shards = {unit.info["shard"]: unit for unit in acquired.units}
    rows = read_selection(selected, store, ["shard", "key"]).to_pylist()
    assert {shards[row["shard"]].stage for row in rows} == {"acquire.web", "acquire.palette"}


def test_rules_see_the_name_of_the_source(local_ray: None, two: Any) -> None:
    rule = {"name": "not_of_the_palette", "column": "source", "op": "==", "value": "web"}
    recipe = two(where=[rule], duplicates=["sha256", "source"])
    assert check_recipe(recipe)
    found = made(recipe)
    assert found["select"].counts.dropped == {"not_of_the_palette": 3, "duplicate_source": 4}
    (row,) = read_selection(found["select"], Store(recipe.store), ["shard"]).to_pylist()
    web = {unit.info["shard"]: unit for unit in found["acquire.web"].units}
    ledger = read_ledger(web[row["shard"]], Store(recipe.store), ["caption", "source"])
    assert set(ledger.column("source").to_pylist()) == {"web"}
    dropped = read_dropped(found["select"], Store(recipe.store), ["reason"])
    assert dropped.num_rows == 7


def test_a_column_of_one_source_is_empty_in_the_other(local_ray: None, two: Any) -> None:
    rule = {"name": "bright", "column": "colour", "op": "!=", "value": "#00ff00"}
    recipe = two(where=[rule])
    (note,) = (note for note in check_recipe(recipe) if note.startswith("select.where.0.column"))
    assert "empty for every pair of sources.web, and the rule drops them all" in note
    assert made(recipe)["select"].counts.dropped == {"bright": 6}
    kept = two(where=[rule | {"missing": "keep"}])
    assert not any(note.startswith("select.where") for note in check_recipe(kept))
    assert made(kept)["select"].counts.dropped == {"bright": 1, "duplicate_sha256": 1}


def test_a_list_that_grows_asks_for_its_new_rows_alone(local_ray: None, two: Any, site: Site, tmp_path: Path) -> None:
    before = made(two())
    assert len(site.asked) == 5
    site.asked.clear()
    with (tmp_path / "list.csv").open("a") as file:
        file.write(f"{site.url('aabbcc')},new\n")
    recipe = two()
    states = {row.node: row.state for row in plan(build_graph(recipe), Store(recipe.store), "small")}
    assert states == {"acquire.web": "to do", "acquire.palette": "up to date", "select": "waiting"}
    after = made(recipe)
    assert site.asked == ["/aabbcc"]
    assert after["acquire.palette"].revision == before["acquire.palette"].revision
    assert after["select"].counts.total == 9


def test_a_source_that_gets_others_beside_it_is_not_fetched_again(
    local_ray: None, two: Any, with_colours: type[Recipe], site: Site, tmp_path: Path
) -> None:
    several = two()
    alone = with_colours.model_validate(
        {**several.model_dump(), "source": several.sources["web"].model_dump(), "sources": {}}
    )
    assert made(alone, "acquire")["acquire"].counts.kept == 5
    site.asked.clear()
    assert made(several)["acquire.web"].counts.kept == 5
    assert site.asked == []


def test_weights_are_in_no_key(local_ray: None, two: Any) -> None:
    recipe = two()
    made(recipe)
    palette = recipe.sources["palette"].model_copy(update={"weight": 4.0})
    other = recipe.model_copy(update={"sources": {**recipe.sources, "palette": palette}})
    rows = plan(build_graph(other), Store(recipe.store), "small")
    assert {row.state for row in rows} == {"up to date"}


def test_errors_name_the_place_of_the_source(two: Any, tmp_path: Path) -> None:
    recipe = two()
    (tmp_path / "list.csv").unlink()
    with pytest.raises(SourceError, match=r"^sources\.web\.files: no file"):
        build_graph(recipe)["acquire.web"].identity  # noqa: B018 - it is read


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("sources: {web: {kind: gallery}}\nsource: {kind: gallery}", "sources: source is given too"),
        ("report: false", "source: missing; add this key, or several by name under sources"),
        ("sources: {}", "source: missing"),
        ("sources: {Web: {kind: gallery}}", "sources.Web: a source's name is lower-case letters"),
        ("source: {kind: gallery, weight: 2}", "source.weight: 2, but there is no other source"),
        ("sources: {a: {kind: gallery, weight: 0}}", "sources.a.weight: must be above 0, got 0"),
        (
            "sources: {a: {kind: urls, files: [a.csv], keep_columns: [source]}}",
            "sources.a.keep_columns: 'source' is where the names of sources stand",
        ),
        ("sources: {a: {kind: gallery, port: 9000}}", "sources.a.port: 127.0.0.1:9000 is where the gallery is served"),
        ("sources: {a: {kind: folder, path: .}}", "'./ldm-store' lies in sources.a.path '.'"),
        ("sources: {a: {kind: urls, files: [a.csv]}}", "sources.a.kind urls fetches from other people's sites"),
        (
            "sources: {a: {kind: gallery}, b: {kind: folder, path: b}}\nselect: {split: {by: colour}}",
            "select.split.by: there is no column 'colour'",
        ),
        ("source: {kind: gallery}\nselect: {split: {by: source}}", "select.split.by: there is no column 'source'"),
    ],
)
def test_what_is_wrong_with_several_sources(given: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(f"name: small\nmodels: {{}}\n{given}\n")
    with pytest.raises(InvalidRecipe) as error:
        checked_recipe(str(path))
    assert told in re.sub(r" \(line \d+\)", "", str(error.value))


def test_identifiers_of_two_sources_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    lists = "{kind: urls, files: [%s.csv], uid_column: id}"
    path.write_text(
        f"name: small\nmodels: {{}}\nsources: {{a: {lists % 'a'}, b: {lists % 'b'}}}\n"
        "acquire: {fetch: {contact: me@latentworks.dev}}\nselect: {split: {by: source}}\n"
    )
    (note,) = checked_recipe(str(path)).notes
    assert note.startswith("sources.a.uid_column: sources.a.uid_column and") or "sources.a and sources.b" in note


def test_types_that_differ_between_sources_are_open() -> None:
    from pipelines.recipe import NamedSource, UrlsSource
    from pipelines.recipe.columns import ledger_columns
    from pipelines.recipe.sources import UNKNOWN

    one = UrlsSource(kind="urls", files=("a.csv",), keep_columns=("size", "tag"))
    other = UrlsSource(kind="urls", files=("b.parquet",), keep_columns=("size",))
    found = ledger_columns([NamedSource("one", one), NamedSource("other", other)])
    assert found.types["size"] == UNKNOWN
    assert found.types["tag"] == found.types["source"] == pa.string()
    assert found.lacking == {"tag": ("sources.other",)}
    assert found.empty["licence"] == (
        "add 'licence' to sources.one.keep_columns; add 'licence' to sources.other.keep_columns"
    )
