"""The report on a data set: what it says is what the tables say, and it is one harmless file."""

from __future__ import annotations

import base64
import io
import re
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from asked import asked
from PIL import Image

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts
from pipelines.building import building
from pipelines.dataset.scores import scores_bytes
from pipelines.publishing import publish_unit
from pipelines.recipe import Execution, NearDuplicates, Predicate, SelectSpec, Split
from pipelines.report import stage
from pipelines.report.rows import SHARDS_PER_SAMPLE, sample
from pipelines.reporting import LogReport
from pipelines.score.phash import THUMBNAIL_BYTES
from pipelines.select.stage import select

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)> flag'
FIELDS = [
    pa.field("clip_similarity", pa.float32()),
    pa.field("phash", pa.uint64()),
    pa.field("thumbnail", pa.binary(THUMBNAIL_BYTES)),
]
SPEC = SelectSpec(
    near_duplicates=NearDuplicates(),
    where=(
        Predicate(name="low_similarity", column="clip_similarity", op=">=", value=0.3),
        Predicate(name="too_long", column="caption", op="max_chars", value=90),
    ),
    split=Split(held_out=0.25),
)
VOID = {"meta", "img", "rect", "line", "br"}


class Page(HTMLParser):
    """Every element with its attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def published_scores(store: Store, acquired: Artifact, twins: dict[int, int]) -> Artifact:
    """`twins` gives a number the looks of another one."""
    with building(store, "score", asked(), {"acquire": acquired}, {}, 1) as build:
        units = []
        for unit in acquired.units:
            ledger = pq.read_table(io.BytesIO(store.read_bytes(unit.only(".parquet"))))
            kept = [row for row in ledger.to_pylist() if row["outcome"] == "kept"]
            columns: dict[str, Any] = {name: [row[name] for row in kept] for name in ("uid", "key")}
            numbers = [int(key) for key in columns["key"]]
            randoms = [np.random.default_rng(twins.get(number, number)) for number in numbers]
            columns["clip_similarity"] = [number % 10 / 10 for number in numbers]
            columns["phash"] = [int(random.integers(0, 2**64, dtype=np.uint64)) for random in randoms]
            columns["thumbnail"] = [random.integers(0, 256, THUMBNAIL_BYTES, np.uint8).tobytes() for random in randoms]
            files: dict[str, Path | bytes] = {"scores.parquet": scores_bytes(columns, FIELDS, {})}
            counts = Counts(len(kept), len(kept))
            units.append(
                publish_unit(store, "score", build.unit_key({"of": unit.digest}), files, counts, dict(unit.info))
            )
        return build.publish(
            units, info={"scorers": {"clip": {"model": "a clip", "version": "1", "sha256": "ab" * 32}}}
        )


def inputs_of(published: Any, **captions: str) -> dict[str, Artifact]:
    """Twenty-four of 32 pictures are kept; 4 looks like 8, and 14 like 29."""
    texts = {5: HOSTILE, 13: "long " * 30} | {int(name[1:]): text for name, text in captions.items()}
    acquired = published.acquire(captions=texts)
    scored = published_scores(published.store, acquired, {4: 8, 14: 29})
    used = {"acquire": acquired, "score": scored}
    return used | {"select": select(SPEC, used, published.store, LogReport(), Execution())}


class Documents(LogReport):
    def __init__(self) -> None:
        self.pages: dict[str, str] = {}

    def document(self, name: str, text: str) -> None:
        self.pages[name] = text


def report_on(published: Any, inputs: dict[str, Artifact]) -> tuple[Artifact, str]:
    told = Documents()
    artifact = stage.report(inputs, published.store, told, Execution())
    html = published.store.read_bytes(artifact.units[0].path("report.html")).decode()
    assert told.pages in ({}, {"report.html": html})
    return artifact, html


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_the_page_says_what_the_tables_say(published: Any) -> None:
    inputs = inputs_of(published)
    artifact, html = report_on(published, inputs)
    page = Page(html)
    counts = inputs["select"].counts
    assert artifact.counts.total == counts.total == 24
    assert page.open == []
    assert counts.dropped == {"low_similarity": 9, "too_long": 1, "near_duplicate": 2}
    for words in ("acquire: 32 URLs in", "failed: timeout 8 (25 %)", f"select: {counts.total} pairs in"):
        assert words in page.text
    for reason, count in counts.dropped.items():
        assert re.search(rf"dropped: {reason} {count} \(", page.text)
    for side in ("train", "held_out"):
        assert f"{side.replace('_', ' ')} {inputs['select'].info[side]} (" in page.text
    assert f"low_similarity: clip_similarity >= 0.3 ({counts.dropped['low_similarity']} dropped)" in page.text
    assert "too_long: caption max_chars 90 (1 dropped)" in page.text
    assert "Apache-2.0" in page.text
    assert "CC-BY-4.0" in page.text
    assert inputs["acquire"].units[2].only(".parquet") in page.text


def test_every_kept_and_dropped_image_is_shown_with_what_decided(published: Any) -> None:
    inputs = inputs_of(published)
    _, html = report_on(published, inputs)
    figures = re.findall(r"<figure>.*?</figure>", html, re.DOTALL)
    counts = inputs["select"].counts
    assert len(figures) == counts.total
    assert counts.dropped["near_duplicate"] == 2
    twins = [figure for figure in figures if figure.count("<img") == 2]
    assert len(twins) == 2
    assert all("0 bits, RMS 0" in figure for figure in twins)
    low = [figure for figure in figures if "clip_similarity 0." in figure or "clip_similarity 0<" in figure]
    assert len(low) == counts.dropped["low_similarity"]
    assert sum("150 characters" in figure for figure in figures) == counts.dropped["too_long"] == 1


def test_images_are_the_shards_own(published: Any, store: Store) -> None:
    inputs = inputs_of(published)
    _, html = report_on(published, inputs)
    sheet = Page(html).of("img")
    rows = pq.read_table(io.BytesIO(store.read_bytes(inputs["select"].units[0].path("selection.parquet")))).to_pylist()
    shards = {unit.info["shard"]: unit for unit in inputs["acquire"].units}
    for row, attributes in zip(rows, sheet, strict=False):
        with tarfile.open(fileobj=io.BytesIO(store.read_bytes(shards[row["shard"]].only(".tar")))) as tar:
            member = tar.extractfile(f"{row['key']}.png")
            assert member is not None
            stored = Image.open(io.BytesIO(member.read())).convert("RGB")
        shown = Image.open(io.BytesIO(base64.b64decode(str(attributes["src"]).partition(",")[2]))).convert("RGB")
        assert shown.size == stored.size
        assert np.abs(np.asarray(shown, int) - np.asarray(stored, int)).mean() < 12  # WebP keeps half of the colours


def test_captions_can_do_nothing(published: Any) -> None:
    _, html = report_on(published, inputs_of(published))
    page = Page(html)
    assert HOSTILE in "".join(page.texts)
    assert page.of("script") == []
    assert all(not name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert all(str(image["src"]).startswith("data:image/webp;base64,") for image in page.of("img"))
    addresses = [
        value for _, attributes in page.elements for name in ("src", "href") if (value := attributes.get(name))
    ]
    assert all(address.startswith("data:") for address in addresses)
    assert "url(" not in html
    assert "@import" not in html
    (policy,) = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none'; img-src data:")


def test_equal_inputs_give_equal_bytes(published: Any, tmp_path: Path) -> None:
    inputs = inputs_of(published)
    told = Documents()
    first = stage.report(inputs, published.store, told, Execution())
    again, html = report_on(published, inputs)
    assert told.pages == {"report.html": html}
    assert again == first
    other = type(published)(Store(tmp_path / "other"), tmp_path / "networks")
    assert report_on(other, inputs_of(other))[1] == html
    assert report_on(other, inputs_of(other, n9="another caption"))[1] != html


def test_without_scores_there_are_captions_alone(published: Any) -> None:
    acquired = published.acquire()
    inputs = {"acquire": acquired, "select": published.select(acquired)}
    _, html = report_on(published, inputs)
    page = Page(html)
    (chart,) = page.of("svg")
    assert str(chart["aria-label"]).startswith("Histogram of caption length, from ")
    assert "Near-duplicates" not in page.text


def test_samples_are_of_few_shards_and_of_any_row() -> None:
    rows = pa.table({"shard": np.repeat(np.arange(100, dtype=np.int32), 50), "row": np.arange(5000)})
    chosen = sample(rows, 40)
    shards = set(chosen.column("shard").to_pylist())
    assert chosen.num_rows == 40
    assert len(shards) == SHARDS_PER_SAMPLE
    assert len(set(chosen.column("row").to_pylist())) == 40
    assert chosen.equals(sample(rows, 40))
    fewer = sample(rows.slice(0, 30), 40)
    assert fewer.column("row").to_pylist() == list(range(30))
    pairs = rows.append_column("winner_shard", pa.array(np.roll(np.repeat(np.arange(100, dtype=np.int32), 50), 25)))
    few = sample(pairs, 40)
    assert len(set(few.column("winner_shard").to_pylist()) | set(few.column("shard").to_pylist())) <= 16
    assert sample(rows.slice(0, 0), 40).num_rows == 0
