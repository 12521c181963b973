"""A hostile HTTP server on loopback, and free ports for the gallery."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

Answer = Callable[[socket.socket, int], None]
"""Sends what it likes: gets the connection, and how often this path was asked for (from 1)."""


class Hostile:
    """`answers` by path; `requests` holds the request heads by path."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: dict[str, list[str]] = {}
        self._asked: Counter[str] = Counter()
        self._lock = threading.Lock()
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    outer._handle(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            chunk = connection.recv(4096)
            if not chunk:
                return
            head += chunk
        path = head.split(b" ", 2)[1].decode()
        with self._lock:
            self._asked[path] += 1
            self.requests.setdefault(path, []).append(head.decode())
        self.answers[path](connection, self._asked[path])

    def url(self, path: str, answer: Answer | bytes) -> str:
        """Register what is sent for a path; its URL."""
        self.answers[path] = (lambda connection, _: connection.sendall(answer)) if isinstance(answer, bytes) else answer
        return f"http://{self.host}{path}"

    def asked(self, path: str) -> int:
        return self._asked[path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def hostile() -> Iterator[Hostile]:
    server = Hostile()
    yield server
    server.close()


@pytest.fixture(scope="module")
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
