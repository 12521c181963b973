"""The built-in gallery as a source: its block, its columns, its checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import Field

from pipelines.gallery.links import HOST
from pipelines.recipe.block import Count, Fraction
from pipelines.recipe.data import Fetch
from pipelines.recipe.problems import Findings
from pipelines.recipe.sources.base import Beside, Bound, SourceBlock, note_repeated

GALLERY_COLUMNS = ("name", "vendor", "licence")


class GallerySource(SourceBlock):
    """Real captioned emoji images from installed packages, served over HTTP on loopback with the web's usual faults."""

    kind: Literal["gallery"]
    """Kind of the source: the built-in gallery of emoji images."""
    port: Annotated[int, Field(ge=1024, le=65535)] = 8377
    """Port on 127.0.0.1 where the images are served. It is part of every URL, so that another port is another source,
    and `acquire.fetch.allow_hosts` must name it."""
    vendors: Annotated[tuple[Literal["Goog", "Twtr"], ...], Field(min_length=1)] = ("Goog", "Twtr")
    """Vendors whose drawings are served: Goog is Noto Emoji, Twtr is Twemoji."""
    limit: Count | None = None
    """Number of images that are served, the first ones of the gallery. null serves all of them."""
    fault_rate: Fraction = 0.04
    """Number of links with a fault per image. Slow, flaky, moved and turned ones stand in for the image's own link;
    dead, truncated, duplicated and opted-out ones come on top."""

    def columns(self) -> Sequence[Any]:
        return [pa.field(name, pa.string()) for name in GALLERY_COLUMNS]

    def fill(self, where: str, column: str) -> str:  # noqa: ARG002 - there is no key that would
        return "the gallery says nothing"

    def bound(self) -> Bound | None:
        if self.limit is None:
            return None
        return Bound("limit", self.limit, self.limit + round(self.fault_rate * self.limit))

    def check_allowed(self, where: str, fetch: Fetch, findings: Findings) -> None:
        """That `acquire.fetch.allow_hosts` names the gallery's host and port."""
        authority = f"{HOST}:{self.port}"
        if authority not in fetch.allow_hosts:
            findings.refuse(
                f"{where}.port",
                f"{authority} is where the gallery is served, which acquire.fetch.allow_hosts {list(fetch.allow_hosts)}"
                " doesn't name, and loopback is refused otherwise: add --set"
                f" 'acquire.fetch.allow_hosts=[\"{authority}\"]'",
            )

    def check(self, where: str, beside: Beside, findings: Findings) -> None:  # noqa: ARG002
        note_repeated(f"{where}.vendors", self.vendors, findings)
