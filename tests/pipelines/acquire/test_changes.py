"""What a plan can say of a source that has changed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.storage import Store
from pipelines.acquire.captions import folder_table
from pipelines.acquire.changes import source_changes
from pipelines.acquire.record import STAGE as NODE
from pipelines.acquire.stage import identity
from pipelines.artifacts import Artifact, Counts
from pipelines.building import building
from pipelines.publishing import publish_unit
from pipelines.recipe import AcquireSpec, FolderSource, GallerySource, Source, UrlsSource


def published(store: Store, source: Source) -> Artifact:
    """As `acquire` would publish it, as far as it is looked at here: a ledger of two shards."""
    with building(store, NODE, identity(AcquireSpec(), source), {}, {}, 1) as build:
        table = folder_table(source) if isinstance(source, FolderSource) else pa.table({"url": ["http://a.example/"]})
        units = []
        for place in range(2):
            rows = table.slice(place * (table.num_rows // 2), None if place else table.num_rows // 2)
            sink = io.BytesIO()
            pq.write_table(rows, sink)
            files: dict[str, Path | bytes] = {f"{place}.parquet": sink.getvalue()}
            counts = Counts(rows.num_rows, rows.num_rows)
            units.append(publish_unit(store, NODE, build.unit_key({"n": place}), files, counts, {"shard": str(place)}))
        return build.publish(units)


def png(seed: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(sink, "PNG")
    return sink.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "photos"
    for place, name in enumerate(("animals/abalone", "animals/bear", "plants/elm tree", "fig", "gorse")):
        path = found / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(place))
        path.with_suffix(".txt").write_text(f"a picture of {name}")
    return found


def test_files_of_a_folder_are_named(folder: Path, tmp_path: Path) -> None:
    store, source = Store(tmp_path / "store"), FolderSource(kind="folder", path=str(folder))
    latest = published(store, source)
    assert source_changes(latest, source, store) is None
    (folder / "animals/abalone.png").write_bytes(png(100))
    assert source_changes(latest, source, store) == "1 of 5 files changed: animals/abalone.png"
    (folder / "gorse.txt").write_text("another caption")
    (folder / "plants/elm tree.png").unlink()
    for name in "pqrst":
        (folder / f"{name}.png").write_bytes(png(1))
    assert source_changes(latest, source, store) == (
        "1 of 9 files changed: animals/abalone.png; captions of 1 changed: gorse.png;"
        " 5 added: p.png, q.png, r.png and 2 more; 1 removed: plants/elm tree.png"
    )


def test_ledgers_that_are_gone_say_nothing(folder: Path, tmp_path: Path) -> None:
    store, source = Store(tmp_path / "store"), FolderSource(kind="folder", path=str(folder))
    latest = published(store, source)
    (folder / "fig.png").write_bytes(png(100))
    store.delete(f"{NODE}/units")
    assert source_changes(latest, source, store) is None


def lists(folder: Path, *names: str) -> UrlsSource:
    return UrlsSource(kind="urls", files=tuple(str(folder / name) for name in names))


def write(path: Path, number: int) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"url,caption\nhttp://a.example/{number},picture {number}\n")


def test_lists_are_named(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for number, name in enumerate(("a.csv", "b.csv", "c.csv", "d.csv")):
        write(tmp_path / name, number)
    latest = published(store, lists(tmp_path, "a.csv", "b.csv", "c.csv"))

    def changes(*names: str) -> str | None:
        return source_changes(latest, lists(tmp_path, *names), store)

    assert changes("a.csv", "b.csv", "c.csv") is None
    assert changes("a.csv", "b.csv", "c.csv", "d.csv") == "1 added: d.csv"
    assert changes("b.csv") == "2 removed: a.csv, c.csv"
    assert changes("c.csv", "b.csv", "a.csv") == "the lists are given in another order, or another number of times"
    assert changes("a.csv", "a.csv", "b.csv", "c.csv") == changes("c.csv", "b.csv", "a.csv")
    write(tmp_path / "b.csv", 9)
    assert changes("a.csv", "b.csv", "c.csv") == "1 of 3 lists changed: b.csv"
    assert changes("b.csv", "d.csv", "c.csv") == "1 of 3 lists changed: b.csv; 1 added: d.csv; 1 removed: a.csv"
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.csv", "c.csv"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / f"x{name}")
    write(tmp_path / "b.csv", 1)
    assert changes("elsewhere/xa.csv", "b.csv", "elsewhere/xc.csv") is None


@pytest.mark.parametrize("settings", [{"limit": 7}, {"port": 8391}, {"fault_rate": 0.5}])
def test_a_gallerys_settings_speak_for_themselves(tmp_path: Path, settings: dict[str, Any]) -> None:
    store, before = Store(tmp_path / "store"), GallerySource(kind="gallery", limit=5)
    latest, after = published(store, before), GallerySource(**({"kind": "gallery", "limit": 5} | settings))
    assert source_changes(latest, after, store) is None
    (name, value), *_ = settings.items()
    (old, new) = (identity(AcquireSpec(), source) for source in (before, after))
    assert new.content["source"][name] == value
    assert new.settings["source"][name] == value
    assert old.settings["source"][name] == before.model_dump()[name]


def test_another_kind_of_source_is_told_by_others(folder: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    latest = published(store, GallerySource(kind="gallery", limit=5))
    assert source_changes(latest, FolderSource(kind="folder", path=str(folder)), store) is None
