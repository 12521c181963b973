"""The columns that the recipe foretells are those that ledgers and scores have."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.acquire.lists import COMPRESSIONS, FORMATS
from pipelines.acquire.plan import shards
from pipelines.dataset.ledger import ledger_schema
from pipelines.dataset.ledgers import SHARD
from pipelines.recipe import FolderSource, GallerySource, NamedSource, ScoreSpec, Source, UrlsSource
from pipelines.recipe.columns import (
    ledger_columns,
    pair_columns,
)
from pipelines.recipe.scorers import columns_by_name
from pipelines.recipe.sources import UNKNOWN
from pipelines.recipe.sources.urls import COMPRESSED, TEXT_LISTS
from pipelines.score.clip import ClipSimilarity
from pipelines.score.nsfw import OpenNsfw
from pipelines.score.phash import PerceptualHash

GALLERY = [NamedSource("", GallerySource(kind="gallery"))]
GOLDEN = Path(__file__).parents[2] / "golden"


@pytest.mark.parametrize(
    "source",
    [
        GallerySource(kind="gallery", limit=3),
        UrlsSource(
            kind="urls",
            files=("lists/first.csv", "lists/second.jsonl"),
            url_column="link",
            caption_column="text",
            uid_column="id",
            keep_columns=("licence", "score"),
        ),
        FolderSource(
            kind="folder",
            path="pictures",
            captions="metadata",
            file_name_column="file",
            text_column="words",
            keep_columns=("licence",),
        ),
    ],
    ids=lambda source: source.kind,
)
def test_ledgers_have_the_columns_that_are_foretold(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    schema = ledger_schema(next(iter(shards(source, 10))).schema)
    found = dict(zip(schema.names, schema.types, strict=True)) | {SHARD.name: SHARD.type}
    foretold = ledger_columns([NamedSource("", source)]).types
    assert foretold.keys() == found.keys()
    assert {name: kind for name, kind in foretold.items() if kind != UNKNOWN} == found


def test_types_of_columns_that_lists_decide_are_left_open() -> None:
    source = UrlsSource(kind="urls", files=("a.parquet", "b.csv"), keep_columns=("score", "language"))
    columns = ledger_columns([NamedSource("", source)])
    assert columns.types["score"] == UNKNOWN
    assert str(columns.types["language"]) == "string"
    assert "language" not in columns.empty
    assert "licence" in columns.empty


def test_scores_have_the_columns_that_are_foretold() -> None:
    by_key = {"clip": ClipSimilarity, "nsfw": OpenNsfw, "phash": PerceptualHash}
    found = {field.name: (key, field.type) for key, scorer in by_key.items() for field in scorer.fields}
    known = {name: (kind.key, column.type) for name, (kind, column) in columns_by_name().items()}
    assert found == known
    assert set(known) <= set(
        pair_columns(
            GALLERY,
            ScoreSpec(clip="hub:a/b", nsfw=True, phash=True, features="efficientnet_lite0"),
        ).types
    )
    scored = pair_columns(GALLERY, ScoreSpec(phash=False))
    assert scored.types.keys() == ledger_columns(GALLERY).types.keys()


def test_facts_that_stages_have_too_are_the_same_there() -> None:
    assert {suffix for suffix, kind in FORMATS.items() if kind != "parquet"} == TEXT_LISTS
    assert set(COMPRESSIONS) == COMPRESSED
