"""A folder's images with their captions, as rows: from text files, from file names, or from a list of metadata.

Every image has a row, and so has every line of metadata; what is wrong with one is told by its outcome.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipelines.acquire.errors import SourceError
from pipelines.acquire.folder import Folder, NotAFile, OutsideFolder, Version, folder_url
from pipelines.acquire.lists import ListFile
from pipelines.dataset.ledger import RESERVED_NAMES
from pipelines.recipe import FolderSource
from pipelines.recipe.sources import FILE_HASH

SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".avif",
    ".tif", ".tiff", ".heic", ".heif", ".jxl", ".jp2", ".ico",
})  # fmt: skip
"""What is taken for an image, in either case. Some have no decoder here: their rows say so."""
METADATA_FILES = ("metadata.csv", "metadata.jsonl")
READ_THREADS = 8
SIDECAR_BYTES = 64 * 2**10
"""What is read of a caption's file."""
TRAILING_NUMBERS = re.compile(r"(\s*\(?\d+\)?)+$")

Row = dict[str, str | None]


def folder_table(source: FolderSource) -> Any:
    """Columns url, caption, those of `keep_columns`, file_sha256, all text; sorted by path. Reads every file once.

    Raises `SourceError`: no folder, no images, no metadata or two of it, a missing column, one with a name of ours.
    """
    folder = Folder(source.path)
    files = folder.files(source.recursive)
    images = [name for name in files if PurePosixPath(name).suffix.lower() in SUFFIXES]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        if source.captions == "metadata":
            rows = _metadata_rows(folder, source, files, images)
        elif source.captions == "sidecar":
            captions = pool.map(lambda name: _sidecar(folder, name, files), images)
            rows = [{"name": name, "caption": caption} for name, caption in zip(images, captions, strict=True)]
        else:
            rows = [{"name": name, "caption": caption_from_name(name)} for name in images]
        if not rows:
            where = "in it or below" if source.recursive else "in it itself (source.recursive is off)"
            raise SourceError(
                f"source.path: {source.path} has no images {where}; known are {' '.join(sorted(SUFFIXES))}"
            )
        hashes = _hashes(folder, files, [str(row["name"]) for row in rows], pool)
    columns: dict[str, list[str | None]] = {
        "url": [folder_url(str(row["name"])) for row in rows],
        "caption": [row["caption"] for row in rows],
        **{name: [row.get(f"kept {name}") for row in rows] for name in source.keep_columns},
        FILE_HASH: hashes,
    }
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})


def caption_from_name(name: str) -> str:
    """ "red apple" for "fruit/red-apple_002.png"."""
    stem = PurePosixPath(name).stem.encode("utf-8", "replace").decode()
    return TRAILING_NUMBERS.sub("", " ".join(re.sub("[_-]", " ", stem).split()))


def _hashes(
    folder: Folder, files: Mapping[str, Version], names: Sequence[str], pool: ThreadPoolExecutor
) -> list[str | None]:
    unique = list(dict.fromkeys(names))
    found = dict(zip(unique, pool.map(lambda name: folder.sha256(name, files.get(name)), unique), strict=True))
    return [found[name] for name in names]


def _sidecar(folder: Folder, image: str, files: Mapping[str, Version]) -> str | None:
    """None if there is no text file, or none that may be read. Bytes that aren't UTF-8 become U+FFFD."""
    name = str(PurePosixPath(image).with_suffix(".txt"))
    if name not in files:
        return None
    try:
        with folder.open(name) as stream:
            return stream.read(SIDECAR_BYTES).decode("utf-8-sig", "replace").strip()
    except (OutsideFolder, NotAFile):
        return None
    except OSError as error:
        raise SourceError(f"source.path: {name} in {folder.path} can't be read: {error}") from error


# -- metadata ----------------------------------------------------------------------------------------------------------


def _metadata_rows(
    folder: Folder, source: FolderSource, files: Mapping[str, Version], images: Sequence[str]
) -> list[Row]:
    """A row for each line, and one without a caption for each image that no line names."""
    _check_names(source)
    columns = list(dict.fromkeys([source.file_name_column, source.text_column, *source.keep_columns]))
    rows: list[Row] = []
    for line in _metadata_lines(folder, source, files, columns):
        kept = {f"kept {name}": line[name] for name in source.keep_columns}
        rows.append({"name": _plain(line[source.file_name_column]), "caption": line[source.text_column], **kept})
    named = {row["name"] for row in rows}
    rows += [{"name": name, "caption": None} for name in images if name not in named]
    return sorted(rows, key=lambda row: str(row["name"]))


def _metadata_lines(
    folder: Folder, source: FolderSource, files: Mapping[str, Version], columns: Sequence[str]
) -> Iterator[Row]:
    names = [name for name in METADATA_FILES if name in files]
    if len(names) != 1:
        found = (
            f"both {' and '.join(names)}: leave one" if names else f"neither {' nor '.join(METADATA_FILES)}: add one"
        )
        raise SourceError(f"source.path: {source.path} has {found}, or set source.captions to sidecar or filename")
    keys = "source.file_name_column, text_column and keep_columns"
    listed = ListFile(f"{source.path.rstrip('/')}/{names[0]}", "source.path", keys)
    try:
        for table in listed.tables(columns, lambda: folder.open(names[0])):
            yield from table.to_pylist()
    except (OutsideFolder, NotAFile) as error:
        raise SourceError(f"source.path: {error}") from error


def _plain(name: str | None) -> str:
    """Without "./" and double slashes; what leads out of the folder goes on doing so."""
    return posixpath.normpath(name) if name else ""


def _check_names(source: FolderSource) -> None:
    taken = sorted((RESERVED_NAMES | {FILE_HASH}) & set(source.keep_columns))
    if taken:
        raise SourceError(
            f"source.keep_columns: {', '.join(taken)} are the ledger's own columns; rename them in the metadata"
        )
