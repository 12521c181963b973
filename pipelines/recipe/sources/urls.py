"""Lists of URLs as a source: their block, their columns, their checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

import pyarrow as pa
from pydantic import Field

from pipelines.dataset.ledger import OPTIONAL_SOURCE_COLUMNS, SOURCE_COLUMNS
from pipelines.recipe.block import Name
from pipelines.recipe.places import check_scheme
from pipelines.recipe.problems import Findings
from pipelines.recipe.sources.base import UNKNOWN, Beside, SourceBlock, check_kept, note_repeated

TEXT_LISTS = frozenset({".csv", ".tsv", ".json", ".jsonl", ".ndjson"})
"""Suffixes of lists whose columns are all text, compressed or not."""
COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst"})


class UrlsSource(SourceBlock):
    """Lists of image URLs with captions."""

    kind: Literal["urls"]
    """Kind of the source: lists of image URLs with captions."""
    files: Annotated[tuple[Name, ...], Field(min_length=1)]
    """Lists of pairs, read in this order: Parquet, CSV, TSV or JSON lines, as local paths, patterns with `*`, or fsspec
    URLs."""
    url_column: Name = "url"
    """Column of the lists that holds the images' URLs."""
    caption_column: Name = "caption"
    """Column of the lists that holds the captions."""
    uid_column: Name | None = None
    """Column of the lists that holds the dataset's own identifiers, which are honoured. null makes identifiers from URL
    and caption, as is done where the column is empty."""
    keep_columns: tuple[Name, ...] = ()
    """Further columns of the lists to carry into the ledger, where `select` can use them."""

    of_others: ClassVar[bool] = True

    def columns(self) -> Sequence[Any]:
        taken = {field.name for field in SOURCE_COLUMNS}
        return [pa.field(name, self._type(name)) for name in dict.fromkeys(self.keep_columns) if name not in taken]

    def check(self, where: str, beside: Beside, findings: Findings) -> None:  # noqa: ARG002
        for place, file in enumerate(self.files):
            check_scheme(f"{where}.files.{place}", file, findings)
        note_repeated(f"{where}.files", self.files, findings)
        if self.url_column == self.caption_column:
            findings.note(f"{where}.caption_column", f"{self.url_column!r} is url_column too: captions will be URLs")
        check_kept(where, self.keep_columns, findings)

    def _type(self, name: str) -> Any:
        texts = {field.name for field in OPTIONAL_SOURCE_COLUMNS}
        return pa.string() if name in texts or all(map(_is_text_list, self.files)) else UNKNOWN


def _is_text_list(file: str) -> bool:
    path = PurePosixPath(file)
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix in TEXT_LISTS
