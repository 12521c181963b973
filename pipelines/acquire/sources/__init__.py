"""The kinds of sources as `acquire` knows them, each with a file here and one in `pipelines.recipe.sources`.

Another kind is a class of `SourceRows` in a file of its own, and its place in `SOURCES`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from pipelines.acquire.errors import SourceError
from pipelines.acquire.sources.base import SourceRows
from pipelines.acquire.sources.folder import FolderRows
from pipelines.acquire.sources.gallery import GalleryRows
from pipelines.acquire.sources.urls import UrlRows
from pipelines.recipe import NamedSource, Source

SOURCES: dict[str, type[SourceRows[Any]]] = {
    "gallery": GalleryRows,
    "urls": UrlRows,
    "folder": FolderRows,
}
"""Kinds of source, by the `kind` of their block."""


def rows_of_source(source: Source) -> SourceRows[Any]:
    """The rows of a source. Raises `SourceError` if nothing is known of its kind."""
    if source.kind not in SOURCES:
        raise SourceError(f"source.kind: {source.kind!r} can't be acquired; there are {', '.join(sorted(SOURCES))}")
    return SOURCES[source.kind](source)


@contextlib.contextmanager
def told_at(source: NamedSource) -> Iterator[None]:
    """Errors about a key of `source` name its place in the recipe: "sources.web.files", where it is one of several."""
    try:
        yield
    except SourceError as error:
        if not source.name:
            raise
        keys = "|".join(sorted(type(source.block).model_fields, key=len, reverse=True))
        message = re.sub(rf"(?<![\w./-])source\.(?=(?:{keys})\b)", f"{source.where}.", str(error))
        raise type(error)(message) from error
