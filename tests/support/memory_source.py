"""A kind of source of its own: pictures that are nowhere but in its recipe's block, as colours. Two classes and their
rows in the two tables are all of it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from PIL import Image

from pipelines.acquire import sources as acquire_sources
from pipelines.acquire.fetch import FetchResult
from pipelines.acquire.origin import Origin, Reader
from pipelines.acquire.rows import Row
from pipelines.acquire.sources.base import Expected, Known, SourceRows
from pipelines.dataset.ledger import ErrorClass, Reason
from pipelines.recipe import Fetch
from pipelines.recipe import sources as recipe_sources
from pipelines.recipe.problems import Findings
from pipelines.recipe.sources import Beside, Bound, SourceBlock

SIDE_PX = 32


class ColoursSource(SourceBlock):
    """Squares of one colour each."""

    kind: Literal["colours"]
    """Kind of the source: colours."""
    colours: dict[str, str]
    """Caption and colour, as #rrggbb, of each square; a colour that is none fails."""

    def columns(self) -> Sequence[Any]:
        return [pa.field("colour", pa.string())]

    def bound(self) -> Bound:
        return Bound("colours", len(self.colours), len(self.colours))

    def check(self, where: str, beside: Beside, findings: Findings) -> None:
        if not self.colours:
            findings.refuse(f"{where}.colours", "there are none; give some")


class ColoursRows(SourceRows[ColoursSource]):
    """A row for each colour."""

    noun = "colours"

    def lists(self) -> Iterator[Iterator[Any]]:
        captions, colours = list(self.block.colours), list(self.block.colours.values())
        yield iter([pa.table({"url": [f"colour:{name}" for name in colours], "caption": captions, "colour": colours})])

    def identity(self) -> tuple[Known, Known]:
        return self.block.content(), self.settings()

    def rules(self, fetch: Fetch) -> Known:
        return {}

    def origin(self) -> Origin:
        return Palette()

    def expected(self) -> Expected:
        return Expected(len(self.block.colours))


@dataclass(frozen=True)
class Palette:
    """Draws the squares."""

    is_web: bool = False

    def reader(self, rows: Sequence[Row], rules: Fetch, sleep: Callable[[float], Any]) -> Reader:
        return self

    def fetch(self, url: str) -> FetchResult:
        sink = io.BytesIO()
        try:
            Image.new("RGB", (SIDE_PX, SIDE_PX), url.removeprefix("colour:")).save(sink, "PNG")
        except ValueError as error:
            return FetchResult(
                reason=Reason.UNREADABLE, message=str(error), error_class=ErrorClass.PERMANENT, attempts=1
            )
        return FetchResult(sink.getvalue(), len(sink.getvalue()), "image/png", attempts=1)

    def check_unchanged(self) -> None:
        """A colour stays what it is."""


def register(setitem: Callable[[Any, str, Any], None]) -> None:
    """Both tables with the kind; `setitem` is `MonkeyPatch.setitem`, which takes it out again."""
    setitem(recipe_sources.SOURCES, "colours", ColoursSource)
    setitem(acquire_sources.SOURCES, "colours", ColoursRows)
