"""Sources to shards: bring what there is to one schema, and cut each list into pieces of a fixed size.

Every list becomes tables with url, caption, uid and the columns that are to be kept, a few thousand rows at a time, so
that memory doesn't grow with the list. A folder is one such table. No shard has rows of two lists, so that a list that
comes or goes leaves the others' shards what they are.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa

from pipelines.acquire.captions import folder_table
from pipelines.acquire.errors import SourceError
from pipelines.acquire.lists import FORMATS, ListFile, list_format
from pipelines.artifacts import digest
from pipelines.dataset.ledger import OPTIONAL_SOURCE_COLUMNS, RESERVED_NAMES, SOURCE_COLUMNS
from pipelines.dataset.uid import make_uid
from pipelines.gallery.links import Gallery
from pipelines.recipe import FolderSource, GallerySource, Source, UrlsSource

WHOLE_FILE_BYTES = 64 * 2**20
SAMPLE_BYTES = 2**20
TEXTS = frozenset(field.name for field in (*SOURCE_COLUMNS, *OPTIONAL_SOURCE_COLUMNS))
"""Our columns that are text, whatever a list has them as."""


def source_identity(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the rows depend on, and the source's settings. Reads the head of each list to see that it can be used.

    A list of up to 64 MiB is known by its content; a larger one by its size, its modification time or ETag, and its
    first and last MiB, so that a run that is up to date starts at once. A folder is known by the content of its files
    and their captions, wherever it lies. The settings name the lists (`names`, without their folders) beside `files`.

    Raises:
        SourceError: a missing file or folder, an unknown format, a wrong column, an empty list or folder.
        GalleryError: its packages aren't installed.
    """
    if isinstance(source, GallerySource):
        return source.content() | {"world": world(source)}, source.model_dump(mode="json") | {"world": world(source)}
    if isinstance(source, FolderSource):
        known = {"kind": "folder", "captions": source.captions, "rows": rows_digest(folder_table(source))}
        return known, source.model_dump(mode="json", exclude={"path"}) | known
    _check_names(source)
    files = _files(source)
    _check_heads(files, source)
    prints = {"files": [_fingerprint(file) for file in files]}
    names = {"names": [PurePosixPath(file).name for file in files]}
    return source.content(exclude=frozenset({"files"})) | prints, source.model_dump(mode="json") | prints | names


def world(source: Source) -> str | None:
    """What is behind the URLs, where that is known beforehand: the gallery's drawings, wherever it is served.

    The web's images are as they are at the time, a folder's are in its rows. Raises `GalleryError` if the gallery's
    packages aren't installed.
    """
    if not isinstance(source, GallerySource):
        return None
    return Gallery(port=0, vendors=(), fault_rate=0.0).identity()  # what is asked of it is in the URLs


def shards(source: Source, shard_size: int) -> Iterator[Any]:
    """Tables of `shard_size` rows, in the order of the source; the last of each list may be shorter.

    Raises `SourceError`.
    """
    for tables in _lists(source):
        waiting: list[Any] = []
        num_waiting = 0
        for table in tables:
            waiting.append(table)
            num_waiting += table.num_rows
            while num_waiting >= shard_size:
                joined = pa.concat_tables(waiting)
                yield joined.slice(0, shard_size).combine_chunks()
                waiting = [joined.slice(shard_size)]
                num_waiting -= shard_size
        if num_waiting:
            yield pa.concat_tables(waiting).combine_chunks()


def gallery_of(source: GallerySource) -> Gallery:
    """The gallery that a recipe asks for."""
    return Gallery(source.port, source.vendors, source.limit, source.fault_rate)


def rows_digest(rows: Any) -> str:
    """Digest of a shard's rows and of the names and types of its columns."""
    hasher = hashlib.sha256(str(rows.schema.remove_metadata()).encode())
    for column in rows.columns:
        hasher.update(repr(column.to_pylist()).encode("utf-8", "surrogatepass"))
    return hasher.hexdigest()


def _lists(source: Source) -> Iterator[Iterator[Any]]:
    """The tables of each list, none of them empty."""
    if isinstance(source, GallerySource):
        yield iter([_with_uids(gallery_of(source).table())])
    elif isinstance(source, FolderSource):
        yield iter([_with_uids(folder_table(source))])
    else:
        for file in _files(source):
            yield map(_with_uids, _file_tables(file, source))


# -- one file ----------------------------------------------------------------------------------------------------------


def _files(source: UrlsSource) -> list[str]:
    return [file for pattern in source.files for file in _expanded(pattern)]


def _expanded(pattern: str) -> list[str]:
    """The files that a path, a folder or a pattern with `*` stands for, sorted. Raises `SourceError` if none."""
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        is_folder = fs.isdir(path)
        if any(character in path for character in "*?["):
            found = sorted(fs.glob(path))
        elif is_folder:
            found = sorted(name for name in fs.ls(path, detail=False) if list_format(name) is not None)
        else:
            found = [path] if fs.exists(path) else []
    except (OSError, ValueError, ImportError) as error:
        raise SourceError(f"source.files: {pattern!r} can't be reached: {error}") from error
    if not found and is_folder:
        raise SourceError(
            f"source.files: {pattern!r} is a folder without lists ({', '.join(FORMATS)}); if it is a folder of images,"
            f" set source.kind=folder and source.path={pattern}"
        )
    if not found:
        raise SourceError(f"source.files: no file {pattern!r}; give paths, URLs or patterns of lists that exist")
    return [fs.unstrip_protocol(name) for name in found]


def _file_tables(file: str, source: UrlsSource) -> Iterator[Any]:
    """The file's rows, none of the tables empty, with our names for the columns."""
    for table in ListFile(file, texts=(source.url_column,)).tables(_wanted(source)):
        yield _our_names(table, source, file)


def _check_heads(files: Sequence[str], source: UrlsSource) -> None:
    """Raises `SourceError` if a list can't be used, none has a row, or their columns don't fit together."""
    schema = None
    for file in files:
        head = next(_file_tables(file, source), None)
        if head is None:
            continue
        try:
            schema = (
                head.schema if schema is None else pa.unify_schemas([schema, head.schema], promote_options="permissive")
            )
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise SourceError(
                f"source.files: {file} doesn't fit together with the lists before it ({error}); give their columns the"
                " same types"
            ) from error
    if schema is None:
        raise SourceError(f"source.files: no rows in {', '.join(map(str, source.files))}; give lists with URLs")


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


def _our_names(table: Any, source: UrlsSource, file: str) -> Any:
    """url and caption, uid if the source has it, and what is to be kept. Raises `SourceError`: a type that can't be."""
    columns = {"url": table[source.url_column], "caption": table[source.caption_column]}
    if source.uid_column is not None:
        columns["uid"] = table[source.uid_column]
    columns |= {name: table[name] for name in source.keep_columns if name not in columns}
    if not _is_text(columns["url"].type):
        raise SourceError(
            f"source.url_column: column {source.url_column!r} of {file} is of type {columns['url'].type}, and is to be"
            " text: name the column that has the URLs"
        )
    return pa.table({name: _text(column, name, file) if name in TEXTS else column for name, column in columns.items()})


def _is_text(kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _text(column: Any, name: str, file: str) -> Any:
    try:
        return column.cast(pa.string())
    except pa.ArrowException as error:
        raise SourceError(
            f"source.files: {file} has a column of type {column.type} for {name}, which is to be text ({error}); name"
            " another column, or give it as text"
        ) from error


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
