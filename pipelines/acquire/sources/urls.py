"""Lists of URLs: their files found, read with our names for their columns, and known by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Store
from pipelines.acquire.errors import SourceError
from pipelines.acquire.lists import FORMATS, ListFile, list_format
from pipelines.acquire.sources.base import Expected, Known, SourceRows, told
from pipelines.artifacts import Artifact, digest
from pipelines.dataset.ledger import OPTIONAL_SOURCE_COLUMNS, RESERVED_NAMES, SOURCE_COLUMNS
from pipelines.recipe import UrlsSource

WHOLE_FILE_BYTES = 64 * 2**20
SAMPLE_BYTES = 2**20
MAX_LISTS = 64
"""Lists whose footers are read, to know how many pairs there are."""
TEXTS = frozenset(field.name for field in (*SOURCE_COLUMNS, *OPTIONAL_SOURCE_COLUMNS))
"""Our columns that are text, whatever a list has them as."""


class UrlRows(SourceRows[UrlsSource]):
    """The rows of lists, a few thousand at a time, so that memory doesn't grow with a list."""

    def lists(self) -> Iterator[Iterator[Any]]:
        for file in _files(self.block):
            yield _file_tables(file, self.block)

    def identity(self) -> tuple[Known, Known]:
        """A list of up to 64 MiB is known by its content; a larger one by its size, its modification time or ETag, and
        its first and last MiB, so that a run that is up to date starts at once.

        Reads the head of each list to see that it can be used. The settings name the lists (`names`, without their
        folders) beside `files`. Raises `SourceError`: a missing file, an unknown format, a wrong column, no rows.
        """
        _check_names(self.block)
        files = _files(self.block)
        _check_heads(files, self.block)
        prints = {"files": [_fingerprint(file) for file in files]}
        names = {"names": [PurePosixPath(file).name for file in files]}
        return self.block.content(exclude=frozenset({"files"})) | prints, self.settings() | prints | names

    def expected(self) -> Expected | None:
        """How many rows there will be, by the footers of Parquet files."""
        try:
            files = [file for pattern in self.block.files for file in fsspec.open_files(pattern, "rb")]
            if len(files) > MAX_LISTS or not all(file.path.endswith(".parquet") for file in files):
                return None
            count, schemas = 0, []
            for file in files:
                with file as stream:
                    footer = pq.ParquetFile(stream)
                    count += footer.metadata.num_rows
                    schemas.append(footer.schema_arrow)
        except (OSError, ValueError, ImportError, pa.ArrowException):
            return None
        return Expected(count, schemas)

    def changes(self, latest: Artifact, store: Store, settings: Mapping[str, Any] | None) -> str | None:  # noqa: ARG002
        """What has changed, by the fingerprints: a list that was moved or renamed is what it was."""
        old: Mapping[str, Any] = latest.settings["source"]
        new = self.identity()[1] if settings is None else settings
        before, after = (
            list(zip(known.get("names", []), known.get("files", []), strict=False)) for known in (old, new)
        )
        gone = [name for name, sum_ in before if sum_ not in new["files"]]
        came = [name for name, sum_ in after if sum_ not in old.get("files", [])]
        changed = [name for name in came if name in gone]
        said = told(
            (f"{len(changed)} of {len(after)} lists changed", changed),
            (f"{len(came) - len(changed)} added", [name for name in came if name not in gone]),
            (f"{len(gone) - len(changed)} removed", [name for name in gone if name not in came]),
        )
        if said is None and old.get("files") != new["files"]:
            return "the lists are given in another order, or another number of times"
        return said


# -- files -------------------------------------------------------------------------------------------------------------


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
