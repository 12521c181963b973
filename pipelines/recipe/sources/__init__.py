"""The kinds of sources that a recipe may name, each with a file here and one in `pipelines.acquire.sources`.

Another kind is a class of `SourceBlock` in a file of its own, and its place in `SOURCES`.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field

from pipelines.recipe.sources.base import FILE_HASH, UNKNOWN, Beside, Bound, SourceBlock
from pipelines.recipe.sources.folder import FolderSource
from pipelines.recipe.sources.gallery import GallerySource
from pipelines.recipe.sources.urls import UrlsSource

__all__ = [
    "ACQUIRE",
    "FILE_HASH",
    "SOURCES",
    "UNKNOWN",
    "Beside",
    "Bound",
    "FolderSource",
    "GallerySource",
    "NamedSource",
    "Source",
    "SourceBlock",
    "UrlsSource",
    "any_source",
]

ACQUIRE = "acquire"
"""Stage whose nodes get the pairs."""

SOURCES: dict[str, type[SourceBlock]] = {
    "gallery": GallerySource,
    "urls": UrlsSource,
    "folder": FolderSource,
}
"""Kinds of source, by `kind`."""


def any_source() -> Any:
    """The type of a block that is a source of any kind, told by `kind`."""
    union = functools.reduce(operator.or_, SOURCES.values())
    return Annotated[union, Field(discriminator="kind")]


if TYPE_CHECKING:
    Source: TypeAlias = SourceBlock
else:
    Source = any_source()


@dataclass(frozen=True)
class NamedSource:
    """A source in its place in a recipe: `name` among `sources`, or "" for the one `source`."""

    name: str
    block: Source

    @property
    def where(self) -> str:
        """The source's key in the recipe: "source", or "sources.photos"."""
        return f"sources.{self.name}" if self.name else "source"

    @property
    def node(self) -> str:
        """The node that gets its pairs: "acquire", or "acquire.photos"."""
        return f"{ACQUIRE}.{self.name}" if self.name else ACQUIRE
