"""Sources to shards: bring what there is to one schema, and cut it into pieces of a fixed size.

Every list becomes tables with url, caption, uid and the columns that are to be kept, a few thousand rows at a time, so
that memory doesn't grow with the list. A folder is one such table.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import pyarrow as pa

from pipelines.acquire.captions import folder_table
from pipelines.acquire.errors import SourceError
from pipelines.acquire.lists import ListFile, list_format
from pipelines.artifacts import digest
from pipelines.dataset.ledger import OPTIONAL_SOURCE_COLUMNS, RESERVED_NAMES, SOURCE_COLUMNS, make_uid
from pipelines.gallery.links import Gallery
from pipelines.recipe import FolderSource, GallerySource, Source, UrlsSource

WHOLE_FILE_BYTES = 64 * 2**20
SAMPLE_BYTES = 2**20


def source_identity(source: Source) -> dict[str, Any]:
    """What the rows depend on. Reads the head of each list to see that it can be used.

    A list of up to 64 MiB is known by its content; a larger one by its size, its modification time or ETag, and its
    first and last MiB, so that a run that is up to date starts at once. A folder is known by the content of its files
    and their captions, wherever it lies.

    Raises:
        SourceError: a missing file or folder, an unknown format, a wrong column, an empty list or folder, packages that
            aren't installed.
    """
    if isinstance(source, GallerySource):
        return {"kind": "gallery", "identity": gallery_of(source).identity()}
    if isinstance(source, FolderSource):
        return {"kind": "folder", "captions": source.captions, "rows": rows_digest(folder_table(source))}
    _check_names(source)
    files = [file for pattern in source.files for file in _expanded(pattern)]
    if all(next(_file_tables(file, source), None) is None for file in files):
        raise SourceError(f"source.files: no rows in {', '.join(map(str, source.files))}; give lists with URLs")
    columns = source.model_dump(mode="json", exclude={"files"})
    return {**columns, "files": [_fingerprint(file) for file in files]}


def shards(source: Source, shard_size: int) -> Iterator[Any]:
    """Tables of `shard_size` rows (the last may be shorter), in the order of the source. Raises `SourceError`."""
    waiting: list[Any] = []
    num_waiting = 0
    for table in _tables(source):
        waiting.append(table)
        num_waiting += table.num_rows
        while num_waiting >= shard_size:
            joined = _joined(waiting)
            yield joined.slice(0, shard_size).combine_chunks()
            waiting = [joined.slice(shard_size)]
            num_waiting -= shard_size
    if num_waiting:
        yield _joined(waiting).combine_chunks()


def gallery_of(source: GallerySource) -> Gallery:
    """The gallery that a recipe asks for."""
    return Gallery(source.port, source.vendors, source.limit, source.fault_rate)


def rows_digest(rows: Any) -> str:
    """Digest of a shard's rows and of the names and types of its columns."""
    hasher = hashlib.sha256(str(rows.schema.remove_metadata()).encode())
    for column in rows.columns:
        hasher.update(repr(column.to_pylist()).encode("utf-8", "surrogatepass"))
    return hasher.hexdigest()


def _tables(source: Source) -> Iterator[Any]:
    if isinstance(source, GallerySource):
        yield _with_uids(gallery_of(source).table())
        return
    if isinstance(source, FolderSource):
        yield _with_uids(folder_table(source))
        return
    for pattern in source.files:
        for file in _expanded(pattern):
            for table in _file_tables(file, source):
                yield _with_uids(table)


def _joined(tables: Sequence[Any]) -> Any:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise SourceError(
            f"source.files: the lists don't fit together ({error}); give their columns the same types"
        ) from error


# -- one file ----------------------------------------------------------------------------------------------------------


def _expanded(pattern: str) -> list[str]:
    """The files that a path, a folder or a pattern with `*` stands for, sorted. Raises `SourceError` if none."""
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        if any(character in path for character in "*?["):
            found = sorted(fs.glob(path))
        elif fs.isdir(path):
            found = sorted(name for name in fs.ls(path, detail=False) if list_format(name) is not None)
        else:
            found = [path] if fs.exists(path) else []
    except (OSError, ValueError, ImportError) as error:
        raise SourceError(f"source.files: {pattern!r} can't be reached: {error}") from error
    if not found:
        raise SourceError(f"source.files: no file {pattern!r}; give paths, URLs or patterns of lists that exist")
    return [fs.unstrip_protocol(name) for name in found]


def _file_tables(file: str, source: UrlsSource) -> Iterator[Any]:
    """The file's rows, none of the tables empty, with our names for the columns."""
    for table in ListFile(file).tables(_wanted(source)):
        yield _our_names(table, source)


# -- columns -----------------------------------------------------------------------------------------------------------


def _check_names(source: UrlsSource) -> None:
    """Raises `SourceError` if a column that is to be kept would collide with one of the ledger's own."""
    taken = sorted(RESERVED_NAMES & set(source.keep_columns))
    if taken:
        raise SourceError(
            f"source.keep_columns: {', '.join(taken)} are the ledger's own columns; rename them in the list"
        )


def _wanted(source: UrlsSource) -> list[str]:
    """The columns to read, each once."""
    uid = [source.uid_column] if source.uid_column is not None else []
    return list(dict.fromkeys([source.url_column, source.caption_column, *uid, *source.keep_columns]))


def _our_names(table: Any, source: UrlsSource) -> Any:
    """url and caption, uid if the source has it, and what is to be kept."""
    columns = {"url": table[source.url_column], "caption": table[source.caption_column]}
    if source.uid_column is not None:
        columns["uid"] = table[source.uid_column]
    columns |= {name: table[name] for name in source.keep_columns if name not in columns}
    texts = {field.name for field in (*SOURCE_COLUMNS, *OPTIONAL_SOURCE_COLUMNS)}
    return pa.table({name: column.cast(pa.string()) if name in texts else column for name, column in columns.items()})


def _with_uids(table: Any) -> Any:
    """Columns url, caption, uid, then the others; a uid that is given is honoured."""
    pairs = zip(table["url"].to_pylist(), table["caption"].to_pylist(), strict=True)
    given = table["uid"].to_pylist() if "uid" in table.column_names else itertools.repeat(None)
    uids = [uid or make_uid(url or "", caption or "") for uid, (url, caption) in zip(given, pairs, strict=False)]
    others = {name: table[name] for name in table.column_names if name not in {"url", "caption", "uid"}}
    columns = {"url": table["url"], "caption": table["caption"], "uid": pa.array(uids, pa.string()), **others}
    return pa.table(columns)


# -- identity ----------------------------------------------------------------------------------------------------------


def _fingerprint(file: str) -> str:
    fs, path = fsspec.core.url_to_fs(file)
    try:
        info = fs.info(path)
        size_bytes = info.get("size")
        if size_bytes is None or size_bytes <= WHOLE_FILE_BYTES:
            with fs.open(path, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        ends = [fs.cat_file(path, 0, SAMPLE_BYTES), fs.cat_file(path, size_bytes - SAMPLE_BYTES, size_bytes)]
    except OSError as error:
        raise SourceError(f"source.files: {file} can't be read: {error}") from error
    version = next((str(info[name]) for name in ("ETag", "etag", "mtime", "LastModified") if info.get(name)), "")
    return digest([size_bytes, version, *(hashlib.sha256(end).hexdigest() for end in ends)])
