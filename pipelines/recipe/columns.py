"""The columns that a pair has when it is selected, as the recipe alone tells: of its ledger, and of its scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipelines.dataset.ledger import OPTIONAL_SOURCE_COLUMNS, SOURCE_COLUMNS, ledger_schema
from pipelines.dataset.ledgers import SHARD
from pipelines.recipe import FolderSource, GallerySource, ScoreSpec, Source, UrlsSource

GALLERY_COLUMNS = ("name", "vendor", "licence")
FILE_HASH = "file_sha256"
"""Of a folder's rows: the hash of each file."""
TEXT_LISTS = frozenset({".csv", ".tsv", ".json", ".jsonl", ".ndjson"})
"""Suffixes of lists whose columns are all text, compressed or not."""
COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst"})
UNKNOWN = pa.null()
"""Stands for a type that only the lists can tell."""

SCORE_COLUMNS: dict[str, tuple[str, Any]] = {
    "clip_similarity": ("clip", pa.float32()),
    "nsfw": ("nsfw", pa.float32()),
    "phash": ("phash", pa.uint64()),
    "thumbnail": ("phash", pa.binary(192)),
}
"""Columns of scores: the key of `score` that switches each on, and its type. They hide a ledger's of their name."""
RANGES = {"clip_similarity": (-1.0, 1.0), "nsfw": (0.0, 1.0)}
"""Least and greatest value of a column of scores."""

EMPTY_WHEN_KEPT = {"reason", "error_class", "error_message", "opt_out"}
"""Columns of a ledger that say why a row was not kept."""


@dataclass(frozen=True)
class Columns:
    """Arrow types by name, `UNKNOWN` where the recipe doesn't tell. `empty`: those without a value in any kept row,
    with what would fill them."""

    types: Mapping[str, Any]
    empty: Mapping[str, str]

    def __contains__(self, name: object) -> bool:
        return name in self.types


def ledger_columns(source: Source) -> Columns:
    """Of the ledgers that `acquire` makes of this source."""
    own = _source_fields(source)
    schema = ledger_schema(pa.schema([*SOURCE_COLUMNS, *own]))
    types = dict(zip(schema.names, schema.types, strict=True)) | {SHARD.name: SHARD.type}
    empty = dict.fromkeys(EMPTY_WHEN_KEPT & types.keys(), "no kept pair has a value there")
    given = {field.name for field in own}
    for field in OPTIONAL_SOURCE_COLUMNS:
        if field.name not in given:
            can_keep = not isinstance(source, GallerySource)
            empty[field.name] = f"add {field.name!r} to source.keep_columns" if can_keep else "the gallery says nothing"
    return Columns(types, empty)


def pair_columns(source: Source, score: ScoreSpec | None) -> Columns:
    """Of ledgers and scores: what `select` looks at."""
    ledger = ledger_columns(source)
    scores = {name: kind for name, (key, kind) in SCORE_COLUMNS.items() if score is not None and getattr(score, key)}
    return Columns({**ledger.types, **scores}, {name: why for name, why in ledger.empty.items() if name not in scores})


def _source_fields(source: Source) -> list[Any]:
    """The columns that a source has beside url, caption and uid."""
    if isinstance(source, GallerySource):
        return [pa.field(name, pa.string()) for name in GALLERY_COLUMNS]
    if isinstance(source, FolderSource):
        return [pa.field(name, pa.string()) for name in dict.fromkeys((*source.keep_columns, FILE_HASH))]
    taken = {field.name for field in SOURCE_COLUMNS}
    return [
        pa.field(name, _kept_type(source, name)) for name in dict.fromkeys(source.keep_columns) if name not in taken
    ]


def _kept_type(source: UrlsSource, name: str) -> Any:
    texts = {field.name for field in OPTIONAL_SOURCE_COLUMNS}
    return pa.string() if name in texts or all(map(_is_text_list, source.files)) else UNKNOWN


def _is_text_list(file: str) -> bool:
    path = PurePosixPath(file)
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix in TEXT_LISTS
