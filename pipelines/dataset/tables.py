"""Published Parquet tables, written with a checksum of each page, and read with it: a flipped bit is an error."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Store
from pipelines.artifacts import REMEDY
from pipelines.dataset.errors import TableUnreadable


def table_bytes(table: Any) -> bytes:
    """The Parquet file of a table."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


@contextmanager
def open_table(store: Store, path: str) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile` for the block.

    Raises `TableUnreadable` for all that is met in the block if the file is missing, cut short or damaged.
    """
    try:
        with store.open(path) as file:
            yield pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise TableUnreadable(f"{store.location(path)} can't be read ({error}); {REMEDY}") from error


def read_table(store: Store, path: str, columns: Sequence[str]) -> Any:
    """The file's columns that are among `columns`. Raises `TableUnreadable`."""
    with open_table(store, path) as file:
        return columns_of(file, columns)


def columns_of(file: Any, columns: Sequence[str]) -> Any:
    """A table of those of `columns` that the open file has, each once."""
    names = [name for name in dict.fromkeys(columns) if name in file.schema_arrow.names]
    return file.read(names, use_threads=False)  # threads abort a process that ends (pyarrow 25, seen)
