"""The built-in gallery: its list of links, and the server behind them."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from pipelines.acquire.sources.base import Expected, Known, SourceRows
from pipelines.gallery.links import Gallery
from pipelines.gallery.server import serving
from pipelines.recipe import GallerySource
from pipelines.recipe.problems import Findings
from pipelines.recipe.sources import Beside


class GalleryRows(SourceRows[GallerySource]):
    """The gallery's links. Raises `GalleryError` if its packages aren't installed."""

    def lists(self) -> Iterator[Iterator[Any]]:
        yield iter([gallery_of(self.block).table()])

    def identity(self) -> tuple[Known, Known]:
        drawn = {"world": drawings()}
        return self.block.content() | drawn, self.settings() | drawn

    def world(self) -> str | None:
        """The drawings, wherever they are served."""
        return drawings()

    def served(self) -> AbstractContextManager[None]:
        return serving(gallery_of(self.block))

    def expected(self) -> Expected | None:
        return Expected(len(gallery_of(self.block).links()))

    def check_here(self, where: str, beside: Beside, to_do: bool, findings: Findings) -> None:  # noqa: ARG002
        """That nobody else listens on the port."""
        if to_do and _is_taken(self.block.port):
            findings.note(
                f"{where}.port",
                f"something listens on port {self.block.port} already; unless that ends, the gallery can't be served:"
                f" choose another with --set {where}.port=N --set 'acquire.fetch.allow_hosts=[\"127.0.0.1:N\"]'",
            )


def gallery_of(source: GallerySource) -> Gallery:
    """The gallery that a recipe asks for."""
    return Gallery(source.port, source.vendors, source.limit, source.fault_rate)


def drawings() -> str:
    """What is known of the images that the gallery has. Raises `GalleryError` if its packages aren't installed."""
    return Gallery(port=0, vendors=(), fault_rate=0.0).identity()  # what is asked of it is in the URLs


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False
