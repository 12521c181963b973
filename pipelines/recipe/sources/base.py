"""What a kind of source is to a recipe: a block of it, the columns that its pairs have, and what can be wrong with it.

How its pairs are got is its other half, in `pipelines.acquire.sources`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pyarrow as pa

from pipelines.dataset.ledger import RESERVED_NAMES
from pipelines.recipe.block import MANNER, Block, PositiveFloat
from pipelines.recipe.data import Fetch
from pipelines.recipe.problems import Findings

UNKNOWN = pa.null()
"""Stands for the type of a column that only the lists can tell."""
FILE_HASH = "file_sha256"
"""A column that a source's rows may have: the hash of what is behind each. Where it has changed, a row is another."""


@dataclass(frozen=True)
class Beside:
    """What of a recipe a source is checked against."""

    fetch: Fetch
    store: str
    state_dir: str


@dataclass(frozen=True)
class Bound:
    """The key of a source that says how many pairs there are, its value, and how many pairs that makes at most."""

    key: str
    value: int
    pairs: int


class SourceBlock(Block):
    """A source of pairs. A kind of source is a class of these: its fields are what a recipe may say of it.

    Methods that check take `where`, the block's place in the recipe: "source", or "sources.photos".
    """

    kind: str
    """Kind of the source. A kind has a `Literal` of its name here."""
    weight: Annotated[PositiveFloat, MANNER] = 1.0
    """Weight beside the other `sources` of the recipe: of a source with 2, twice as much is meant to be drawn as of one
    with 1. It is recorded with the selection, and no training uses it yet."""

    of_others: ClassVar[bool] = False
    """Whether it fetches from other people's sites, who must be able to reach who fetches."""

    def columns(self) -> Sequence[Any]:
        """Arrow fields of the columns that its pairs have beside url, caption and uid; `UNKNOWN` if lists decide."""
        return ()

    def fill(self, where: str, column: str) -> str:
        """What would fill a column, such as `licence`, that no pair has a value in."""
        return f"add {column!r} to {where}.keep_columns"

    def bound(self) -> Bound | None:
        """How many pairs there are at most, if the block alone says so."""
        return None

    def check_allowed(self, where: str, fetch: Fetch, findings: Findings) -> None:
        """What must be so before anything is fetched."""

    def check(self, where: str, beside: Beside, findings: Findings) -> None:
        """Everything else that the recipe alone shows to be wrong."""


def note_repeated(where: str, entries: Sequence[str], findings: Findings) -> None:
    """A note on each entry that is there more than once."""
    for entry, count in Counter(entries).items():
        if count > 1:
            findings.note(where, f"{entry!r} is there {count} times; its pairs are dropped as repeated but for once")


def check_kept(where: str, names: Sequence[str], findings: Findings, own: Mapping[str, object] | None = None) -> None:
    """That no column which is to be kept has the name of one of the ledger's, or of the source's `own`."""
    for place, name in enumerate(names):
        if name in RESERVED_NAMES or name in (own or {}):
            findings.refuse(
                f"{where}.keep_columns.{place}",
                f"{name!r} is a column of the ledger's own; leave it out, or rename it in the source",
            )
