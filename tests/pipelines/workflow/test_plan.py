"""What a run would do and why: by what is published, what has changed, and what is asked for again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from filled import filled

from infra.locks import Locked, lock
from infra.storage import Store
from pipelines.again import asked_again
from pipelines.errors import UsageError
from pipelines.recipe import Recipe
from pipelines.recipe.file import load_recipe
from pipelines.results import Row
from pipelines.workflow.graph import build_graph
from pipelines.workflow.plan import newest, plan
from pipelines.workflow.run import claim, prepare

RECIPE = """
name: mine
source: {kind: urls, files: [urls.csv]}
models: {}
store: ./store
"""


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("urls.csv").write_text("url,caption\nhttps://example.org/1.png,one\n")
    Path("mine.yaml").write_text(RECIPE)


def recipe(*overrides: str) -> Recipe:
    return load_recipe("mine.yaml", overrides)


def rows(recipe: Recipe) -> dict[str, Row]:
    return {row.node: row for row in plan(build_graph(recipe), Store(recipe.store), recipe.name)}


def states(found: Mapping[str, Row]) -> dict[str, Any]:
    return {name: row.state for name, row in found.items()}


def test_a_node_behind_one_that_is_to_do_waits() -> None:
    found = rows(recipe())
    assert states(found) == {"acquire": "to do", "select": "waiting", "report": "waiting"}
    assert found["acquire"].why == "not made yet"
    assert found["report"].why == "after acquire, select"
    filled(recipe())
    assert set(states(rows(recipe())).values()) == {"up to date"}


def test_what_has_changed_is_named_and_how() -> None:
    filled(recipe())
    found = rows(recipe("select.split.held_out=0.2"))
    assert found["acquire"].state == "up to date"
    assert found["select"].why == "changed: split.held_out 0.05 -> 0.2"
    assert rows(recipe("acquire.shard_size=7"))["acquire"].why == "changed: acquire.shard_size 10000 -> 7"
    both = rows(recipe("acquire.fetch.timeout_s=99", "acquire.fetch.max_bytes=7"))["acquire"]
    assert both.why == "changed: acquire.fetch.max_bytes 20000000 -> 7"
    with Path("urls.csv").open("a") as file:
        file.write("https://example.org/2.png,two\n")
    assert rows(recipe())["acquire"].why.startswith("changed: source.files.0 ")


def test_a_change_of_manners_changes_nothing() -> None:
    filled(recipe())
    changed = rows(recipe("acquire.fetch.timeout_s=99", "execution.acquire_tasks=5"))
    assert set(states(changed).values()) == {"up to date"}


@pytest.mark.parametrize("what", ["keys/{key}.json", "revisions/{revision}/manifest.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_manifest_that_is_damaged_or_gone_is_to_do_and_says_so(what: str, how: str) -> None:
    made = filled(recipe())["select"]
    path = Path("store", "select", what.format(key=made.key, revision=made.revision))
    data = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:30] if how == "cut" else bytes([data[0]]) + data[1:].replace(b"9", b"8", 1))
    row = rows(recipe())["select"]
    is_forgotten = how == "gone" and what.startswith("keys")  # then nothing says that there was one
    assert (row.state, row.why) == ("to do", "not made yet" if is_forgotten else "its manifest is missing or damaged")


def test_the_note_of_the_latest_may_be_damaged() -> None:
    filled(recipe())
    Path("store/recipes/mine/select.json").write_text("{")
    assert states(rows(recipe()))["select"] == "up to date"
    assert rows(recipe("select.split.held_out=0.2"))["select"].why == "not made yet"
    assert newest(Store("store"), "mine", "select") is None


def test_the_newest_is_found_whatever_its_settings() -> None:
    assert newest(Store("store"), "mine", "acquire") is None
    filled(recipe(), ["acquire"])
    other = filled(recipe("acquire.shard_size=7"), ["acquire"])["acquire"]
    found = newest(Store("store"), "mine", "acquire")
    assert found is not None
    assert found.key == other.key


# -- what is asked for again ---------------------------------------------------------------------------------------


def written() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path("store").rglob("*") if path.is_file()}


def test_a_dry_run_shows_what_is_forced_and_writes_nothing() -> None:
    filled(recipe())
    before = written()
    found = {row.node: row for row in prepare(recipe(), None, ["select"]).rows}
    assert states(found) == {"acquire": "up to date", "select": "to do", "report": "waiting"}
    assert found["select"].why == "asked for with --force"
    assert written() == before


def test_what_is_forced_is_noted_when_the_run_begins_so_that_one_that_dies_goes_on_with_it() -> None:
    made = filled(recipe())
    claimed = claim(prepare(recipe(), None, ["select"]))
    assert claimed.demands == {}
    again = asked_again(Store("store"), "select", made["select"].key)
    assert again is not None
    assert again.why == "force"
    assert rows(recipe())["select"].why == "asked for with --force"


def test_what_is_forced_behind_what_is_to_do_waits_for_its_turn() -> None:
    """Its key is known once its inputs are there: it is noted then."""
    filled(recipe())
    prepared = prepare(recipe(), None, ["acquire", "select"])
    found = {row.node: row for row in prepared.rows}
    assert found["select"].why == "after acquire; asked for with --force"
    assert list(claim(prepared).demands) == ["select"]


def test_what_is_to_be_fetched_again_is_counted_and_asked_for() -> None:
    made = filled(recipe(), ["acquire"], failed={"timeout": 30, "not_found": 5})["acquire"]
    before = written()
    prepared = prepare(recipe(), "acquire", (), ["timeout"])
    assert prepared.rows[0].why == "asked for with --retry timeout: 30 rows"
    assert written() == before
    claim(prepared)
    again = asked_again(Store("store"), "acquire", made.key)
    assert again is not None
    assert (again.why, again.reasons) == ("retry", ("timeout",))


def test_a_reason_for_which_nothing_failed_is_refused() -> None:
    filled(recipe(), ["acquire"], failed={"not_found": 5})
    with pytest.raises(UsageError, match=r"--retry timeout: no row failed so; .*: not_found"):
        prepare(recipe(), "acquire", (), ["timeout"])


def test_another_runs_lock_is_seen_before_anything_is_written(store: Store) -> None:
    asked = recipe(f"store={store.url}")
    prepared = prepare(asked, None, ["acquire"])
    with (
        lock(store, f"acquire/{prepared.rows[0].key}"),
        pytest.raises(Locked, match=r"another run is writing .*acquire/.*process \d+"),
    ):
        claim(prepared)
    assert not store.exists("acquire/keys")
    claim(prepared)
    assert [name.rpartition(".")[2] for name in store.listdir("acquire/keys")] == ["again"]
