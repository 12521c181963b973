"""Rows of one list, whatever its format, a few thousand at a time: Parquet, CSV, TSV, JSON lines, compressed or not.

Text formats give text columns; Parquet keeps its types. What the columns mean is the caller's matter.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.acquire.errors import SourceError

BATCH_ROWS = 4096
FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}


def list_format(file: str) -> str | None:
    """ "csv" for "a/list.csv.gz"; None if the suffix is unknown."""
    path = PurePosixPath(file)
    if path.suffix in COMPRESSIONS:
        path = path.with_suffix("")
    return FORMATS.get(path.suffix)


@dataclass(frozen=True)
class ListFile:
    """A list, and how errors speak of it: `key` of the recipe named it, `column_keys` name its columns."""

    file: str
    key: str = "source.files"
    column_keys: str = "source.url_column, caption_column, uid_column and keep_columns"
    texts: tuple[str, ...] = ()
    """Columns that are to be text, in formats whose values have types of their own (JSON)."""

    def tables(
        self, columns: Sequence[str], opened: Callable[[], AbstractContextManager[IO[bytes]]] | None = None
    ) -> Iterator[Any]:
        """Tables of `columns`, none of them empty. `opened` gives the bytes, where fsspec doesn't by the file's name.

        Raises `SourceError`: an unknown format, a missing column, bytes that can't be read.
        """
        kind = list_format(self.file)
        if kind is None:
            raise SourceError(
                f"{self.key}: {self.file!r} is of no known format; known are {', '.join(FORMATS)}, and these compressed"
                f" ({', '.join(COMPRESSIONS)})"
            )
        try:
            with (opened or self._opened)() as stream:
                for table in _READERS[kind](self, stream, columns):
                    if table.num_rows:
                        yield table
        except (OSError, EOFError, ValueError, zlib.error, csv.Error, pa.ArrowException) as error:
            raise SourceError(f"{self.key}: {self.file} can't be read as {kind}: {error}") from error

    def require(self, wanted: Sequence[str], existing: Sequence[str]) -> None:
        """Raises `SourceError` if a column is missing."""
        missing = [name for name in wanted if name not in existing]
        if not missing:
            return
        lacks = f"{self.key}: {self.file} has no column {', '.join(map(repr, missing))}"
        if any("://" in name for name in existing):
            raise SourceError(f"{lacks}: its first line is to name the columns, but has a URL in it; add such a line")
        raise SourceError(f"{lacks}; it has {', '.join(map(repr, existing))}; set {self.column_keys}")

    def _opened(self) -> AbstractContextManager[IO[bytes]]:
        compression = COMPRESSIONS.get(PurePosixPath(self.file).suffix)
        opened: AbstractContextManager[IO[bytes]] = fsspec.open(self.file, "rb", compression=compression)
        return opened


def _parquet_tables(listed: ListFile, stream: IO[bytes], wanted: Sequence[str]) -> Iterator[Any]:
    parquet = pq.ParquetFile(stream)
    listed.require(wanted, parquet.schema_arrow.names)
    for batch in parquet.iter_batches(BATCH_ROWS, columns=list(wanted)):
        yield pa.Table.from_batches([batch])


def _csv_tables(listed: ListFile, stream: IO[bytes], wanted: Sequence[str]) -> Iterator[Any]:
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        yield from _text_tables(listed, csv.DictReader(text), wanted)


def _tsv_tables(listed: ListFile, stream: IO[bytes], wanted: Sequence[str]) -> Iterator[Any]:
    """Tab-separated values know no quotes: a quotation mark is a character of the caption."""
    with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        yield from _text_tables(listed, csv.DictReader(text, dialect="excel-tab", quoting=csv.QUOTE_NONE), wanted)


def _jsonl_tables(listed: ListFile, stream: IO[bytes], wanted: Sequence[str]) -> Iterator[Any]:
    def rows() -> Iterator[Mapping[str, Any]]:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise SourceError(
                    f"{listed.key}: {listed.file}, line {number}: expected an object, {{...}}, on each line"
                )
            yield row

    yield from _text_tables(listed, rows(), wanted)


def _text_tables(listed: ListFile, rows: Iterator[Mapping[str, Any]], wanted: Sequence[str]) -> Iterator[Any]:
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        # The `csv` module puts what is beyond the header under None.
        listed.require(wanted, list(dict.fromkeys(name for row in batch for name in row if name is not None)))
        for name in listed.texts:
            kinds = {type(row[name]).__name__ for row in batch if row.get(name) is not None}
            if kinds and "str" not in kinds:
                raise SourceError(
                    f"{listed.key}: column {name!r} of {listed.file} is of type {', '.join(sorted(kinds))}, and is to"
                    f" be text: set {listed.column_keys}"
                )
        columns = {name: pa.array([_text(row.get(name)) for row in batch], pa.string()) for name in wanted}
        yield pa.table(columns)


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


_READERS = {"parquet": _parquet_tables, "csv": _csv_tables, "tsv": _tsv_tables, "jsonl": _jsonl_tables}
