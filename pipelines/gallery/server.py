"""Serve the gallery over HTTP on loopback, with the web's faults: each is written in the path that is asked for.

Keeps no state but one: a flaky path fails the first time that it is asked for. Speaks as much HTTP as it takes to be
fetched by anyone, and as little of it as lets it break off in the middle.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import io
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

from pipelines.gallery.links import HOST, Gallery, GalleryError, Link, emojis_of

if TYPE_CHECKING:
    from PIL.Image import Image

SLOW_S = (0.5, 2.0)
BOMB_SIDE_PX = 30_000
PRIVATE_URL = "http://169.254.169.254/latest/meta-data/"
REQUEST_TIMEOUT_S = 10.0
MAX_REQUEST_BYTES = 16_384
START_TIMEOUT_S = 10.0
OPT_OUTS = {
    Link.NO_ROBOTS: ("X-Robots-Tag", "noai, noimageai"),
    Link.NO_MINING: ("tdm-reservation", "1"),
    Link.NO_TRAINING: ("Content-Usage", "train-ai=n"),
    Link.NO_SIGNAL: ("Content-Signal", "search=yes, ai-train=no"),
}
PAGE = (
    b"<!DOCTYPE html>\n<html><head><title>Moved</title></head><body>This picture has moved to our shop.</body></html>\n"
)


@dataclass(frozen=True)
class Answer:
    """`announced_bytes` is the Content-Length where it isn't the body's."""

    status: HTTPStatus = HTTPStatus.OK
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    announced_bytes: int | None = None
    delay_s: float = 0.0

    def head(self) -> bytes:
        length = len(self.body) if self.announced_bytes is None else self.announced_bytes
        headers = {"Server": "gallery", "Content-Length": str(length), "Connection": "close", **self.headers}
        lines = [f"HTTP/1.1 {self.status.value} {self.status.phrase}", *(f"{n}: {v}" for n, v in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


@contextlib.contextmanager
def serving(gallery: Gallery) -> Iterator[None]:
    """Serve from a thread of this process, so that the server can't outlive it. Raises `GalleryError` (port in use)."""
    site = Site(gallery)
    listening = _listen(gallery.port)
    stops: list[Callable[[], object]] = []
    started = threading.Event()

    async def serve() -> None:
        stopped = asyncio.Event()
        stops.append(functools.partial(asyncio.get_running_loop().call_soon_threadsafe, stopped.set))
        async with await asyncio.start_server(site.handle, sock=listening, limit=MAX_REQUEST_BYTES):
            started.set()
            await stopped.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True, name=f"gallery on port {gallery.port}")
    thread.start()
    try:
        if not started.wait(START_TIMEOUT_S):
            raise GalleryError(f"the gallery on port {gallery.port} did not start within {START_TIMEOUT_S:g} s")
        yield
    finally:
        for stop in stops:
            stop()
        thread.join(START_TIMEOUT_S)
        listening.close()


class Site:
    """What is answered to a path. Lets nobody at files but the vendors' own drawings."""

    def __init__(self, gallery: Gallery) -> None:
        self._emojis = {emoji.place: emoji for vendor in gallery.vendors for emoji in emojis_of(vendor)}
        self._asked: set[str] = set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        try:
            request = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), REQUEST_TIMEOUT_S)
            answer = self.answer(request.split(b"\r\n", 1)[0].decode("latin-1"))
            await asyncio.sleep(answer.delay_s)
            writer.write(answer.head() + answer.body)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
            pass  # the client's affair
        finally:
            writer.close()

    def answer(self, request_line: str) -> Answer:
        """What is sent for "GET /<kind>/<style>/<codepoints>.<suffix> HTTP/1.1"."""
        method, _, rest = request_line.partition(" ")
        path = rest.partition(" ")[0]
        if method != "GET":
            return Answer(HTTPStatus.METHOD_NOT_ALLOWED)
        kind, _, name = path.removeprefix("/").partition("/")
        place = name.rpartition(".")[0]
        if kind not in set(Link) or place not in self._emojis:
            return Answer(HTTPStatus.NOT_FOUND)
        link = Link(kind)
        if link is Link.FLAKY and path not in self._asked:
            self._asked.add(path)
            return Answer(HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "0"})
        return _without_image(link, place) or _with_image(link, self._emojis[place].file.read_bytes(), path)


def _without_image(link: Link, place: str) -> Answer | None:
    """What is sent for a link that leads elsewhere or nowhere; None for the others."""
    statuses = {Link.MISSING: HTTPStatus.NOT_FOUND, Link.GONE: HTTPStatus.GONE}
    moves = {
        Link.MOVED: f"/{Link.PLAIN}/{place}.png",
        Link.MOVED_TWICE: f"/{Link.MOVED}/{place}.png",
        Link.PRIVATE: PRIVATE_URL,
    }
    if link in statuses:
        return Answer(statuses[link])
    return Answer(HTTPStatus.FOUND, {"Location": moves[link]}) if link in moves else None


def _with_image(link: Link, drawing: bytes, path: str) -> Answer:
    match link:
        case Link.TRUNCATED:
            return Answer(body=drawing[: len(drawing) // 2], announced_bytes=len(drawing))
        case Link.PAGE:
            return Answer(headers={"Content-Type": "text/html; charset=utf-8"}, body=PAGE)
        case Link.SIDEWAYS:
            return Answer(headers={"Content-Type": "image/jpeg"}, body=_sideways_jpeg(drawing))
        case Link.SIXTEEN_BIT:
            drawing = _sixteen_bit_png(drawing)
        case Link.BOMB:
            drawing = bomb_png()
    headers = {"Content-Type": "image/png", **dict([OPT_OUTS[link]] if link in OPT_OUTS else [])}
    return Answer(headers=headers, body=drawing, delay_s=_delay_s(path) if link is Link.SLOW else 0.0)


def _delay_s(path: str) -> float:
    """Between the bounds, and always the same for the same path."""
    shortest_s, longest_s = SLOW_S
    return shortest_s + (longest_s - shortest_s) * (zlib.crc32(path.encode()) % 1000) / 1000


def _on_white(png: bytes) -> Image:
    from PIL import Image

    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", drawing.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, drawing).convert("RGB")


def _sideways_jpeg(png: bytes) -> bytes:
    """The drawing lying on its side, with the EXIF orientation (6) that says so."""
    from PIL import Image

    lying = _on_white(png).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    sink = io.BytesIO()
    lying.save(sink, "JPEG", quality=95, exif=exif)
    return sink.getvalue()


def _sixteen_bit_png(png: bytes) -> bytes:
    """The drawing on white in 16 bits a channel, each value times 257."""
    import numpy as np

    pixels = np.asarray(_on_white(png)).astype(">u2") * 257
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return _png_file(pixels.shape[1], pixels.shape[0], bit_depth=16, color_type=2, scanlines=zlib.compress(rows))


@functools.cache
def bomb_png() -> bytes:
    """About 100 kB that decode to 900 million pixels: all white, one bit each."""
    compressor = zlib.compressobj(9)
    row = b"\0" + b"\xff" * ((BOMB_SIDE_PX + 7) // 8)
    block = b"".join(compressor.compress(row * 100) for _ in range(BOMB_SIDE_PX // 100))
    return _png_file(BOMB_SIDE_PX, BOMB_SIDE_PX, bit_depth=1, color_type=0, scanlines=block + compressor.flush())


def _png_file(width: int, height: int, *, bit_depth: int, color_type: int, scanlines: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bit_depth, color_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", scanlines), (b"IEND", b""))
    packed = (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def _listen(port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise GalleryError(
                f"port {port} on {HOST} is in use, and the gallery is to be served there: end what listens on it, or"
                f" choose another with --set source.port=N --set 'acquire.fetch.allow_hosts=[\"{HOST}:N\"]'"
            ) from error
        raise GalleryError(f"the gallery can't listen on {HOST}:{port} (recipe key source.port): {error}") from error
    return listening
