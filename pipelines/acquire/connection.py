"""One HTTP request over a connection of its own, to an address that was checked, under one deadline.

Every wait (connecting, handshake, each chunk of a header or a body) is bounded by what is left of the deadline, so that
a server that sends a byte now and then can't hold a thread. What answers mean is the caller's matter.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import socket
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from pipelines.acquire.addresses import SocketAddress, Target

BUFFER_BYTES = 65_536


class Deadline:
    """A point in time by which all must be done."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._end_s = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds that are left, more than 0. Raises `TimeoutError` if none are."""
        left_s = self._end_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"not done within {self._timeout_s:g} s")
        return left_s


@contextlib.contextmanager
def get(
    target: Target, addresses: Sequence[SocketAddress], headers: Mapping[str, str], deadline: Deadline
) -> Iterator[http.client.HTTPResponse]:
    """The response to a GET, its body still to be read; the connection is closed at the end of the block.

    Raises `OSError` (with `TimeoutError` and `ssl.SSLError`) and `http.client.HTTPException`.
    """
    with contextlib.closing(_connect(addresses, deadline)) as plain:
        connected = _secured(plain, target.host, deadline) if target.scheme == "https" else plain
        with contextlib.closing(connected):
            lines = [f"GET {target.path} HTTP/1.1", f"Host: {target.authority}", "Connection: close"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            connected.settimeout(deadline.left_s())
            connected.sendall("\r\n".join([*lines, "", ""]).encode("latin-1", "replace"))
            # HTTPResponse asks its socket for a file to read from, and for nothing else.
            response = http.client.HTTPResponse(cast(socket.socket, _Readable(connected, deadline)), method="GET")
            response.begin()
            yield response


@functools.cache
def tls_context() -> ssl.SSLContext:
    """The TLS context, one for each process: loading the certificates costs far more than a request."""
    return ssl.create_default_context()


def _connect(addresses: Sequence[SocketAddress], deadline: Deadline) -> socket.socket:
    """Tries one address after the other, each with its share of the time."""
    for place, entry in enumerate(addresses, start=1):
        connected = socket.socket(entry.family, socket.SOCK_STREAM)
        try:
            connected.settimeout(deadline.left_s() / (len(addresses) - place + 1))
            connected.connect(entry.address)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            connected.close()
            if place == len(addresses):
                raise
        else:
            return connected
    raise ConnectionError("no address to connect to")


def _secured(plain: socket.socket, host: str, deadline: Deadline) -> ssl.SSLSocket:
    plain.settimeout(deadline.left_s())
    secured = tls_context().wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
    try:
        secured.settimeout(deadline.left_s())
        secured.do_handshake()
    except OSError:
        secured.close()
        raise
    return secured


class _Readable:
    """As much of a socket as `HTTPResponse` uses."""

    def __init__(self, connected: socket.socket, deadline: Deadline) -> None:
        self._reader = _DeadlineReader(connected, deadline)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self._reader, BUFFER_BYTES)


class _DeadlineReader(io.RawIOBase):
    def __init__(self, connected: socket.socket, deadline: Deadline) -> None:
        self._socket = connected
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._socket.settimeout(self._deadline.left_s())
        return self._socket.recv_into(buffer)
