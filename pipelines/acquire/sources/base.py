"""What a kind of source is to `acquire`: its rows, what they are known by, and where their images are read.

What a recipe may say of it is its other half, in `pipelines.recipe.sources`.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from infra.storage import Store
from pipelines.acquire.origin import WEB, Origin
from pipelines.artifacts import Artifact
from pipelines.recipe import Fetch, SourceBlock
from pipelines.recipe.problems import Findings
from pipelines.recipe.sources import Beside

SHOWN = 3
"""Names that are given of what has changed; of the others, their number."""

Known = dict[str, Any]
BlockOf = TypeVar("BlockOf", bound=SourceBlock)


@dataclass(frozen=True)
class Expected:
    """What can be told of a source's rows without reading them: how many there are at most, and the Arrow schemas of
    the lists that they come from, if these have types."""

    num_rows: int
    schemas: Sequence[Any] = ()


class SourceRows(ABC, Generic[BlockOf]):
    """The rows of one source. A kind of source is a class of these, made with its block of the recipe."""

    noun: ClassVar[str] = "URLs"
    """What the source's rows are called."""

    def __init__(self, block: BlockOf) -> None:
        self.block = block

    @abstractmethod
    def lists(self) -> Iterator[Iterator[Any]]:
        """Tables of each list, none of them empty: url, caption, perhaps uid, and the block's columns.

        Read twice, with equal rows. No shard has rows of two lists. Raises `SourceError`.
        """

    @abstractmethod
    def identity(self) -> tuple[Known, Known]:
        """What the rows depend on, which decides over keys, and the source's settings, for people; both with `kind`.

        Raises `SourceError` if the source can't be used.
        """

    def settings(self) -> Known:
        """All that the block says, but for its weight, on which no row depends."""
        return self.block.model_dump(mode="json", exclude={"weight"})

    def world(self) -> str | None:
        """What is behind the rows' URLs, where that is known beforehand; rows are taken over only from the same one."""
        return None

    def rules(self, fetch: Fetch) -> Known:
        """What of `acquire.fetch` affects the outcome of its rows, at other than neutral values."""
        return fetch.content()

    def served(self) -> AbstractContextManager[None]:
        """Serves the images while shards are made, where nobody else does."""
        return contextlib.nullcontext()

    def origin(self) -> Origin:
        """Where workers read the images. Raises `SourceError` if it isn't there."""
        return WEB

    def expected(self) -> Expected | None:
        """What can be told without reading the rows; None if nothing can. Never raises for a source that can't be used:
        `identity` does."""
        return None

    def check_here(self, where: str, beside: Beside, to_do: bool, findings: Findings) -> None:
        """What is wrong with it on this machine. `where` is its place in the recipe, `to_do` whether it will be read.

        Problems are of what the recipe names.
        """

    def changes(self, latest: Artifact, store: Store, settings: Mapping[str, Any] | None) -> str | None:  # noqa: ARG002
        """What has changed since `latest`, of a source of this kind, was acquired: "1 of 3 lists changed: b.csv".

        `settings` are those of `identity`, where they are known. None if nothing has that could be named.
        """
        return None


def told(*parts: tuple[str, Sequence[str]]) -> str | None:
    """ "1 of 3 lists changed: b.csv; 1 added: c.csv", of what and which; None if there are none of any."""
    return "; ".join(f"{what}: {_shown(names)}" for what, names in parts if names) or None


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
