from __future__ import annotations

import datetime
import gzip
import io
import ipaddress
import socket
import ssl
import subprocess
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.acquire import connection
from pipelines.acquire.fetch import Fetcher, FetchResult
from pipelines.dataset.ledger import ErrorClass, Outcome, Reason
from pipelines.recipe import Fetch


def png(side: int = 64) -> bytes:
    sink = io.BytesIO()
    Image.effect_noise((side, side), 80).save(sink, "PNG")
    return sink.getvalue()


PNG = png()


def response(body: bytes = PNG, *lines: str, status: str = "200 OK", length: int | None = None) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", *lines, "", ""]
    return "\r\n".join(head).encode() + body


def fetch(hostile: Any, url: str, **rules: Any) -> FetchResult:
    settings = {"timeout_s": 2.0, "attempts": 2, "max_bytes": 100_000, "allow_hosts": (hostile.host,), **rules}
    return Fetcher(Fetch(**settings), sleep=lambda _: None).fetch(url)


def test_a_good_image(hostile: Any) -> None:
    url = hostile.url("/a.png", response())
    result = fetch(hostile, url, user_agent="ours/1.2", contact="mail@a.example")
    assert result.body == PNG
    assert (result.mime, result.http_status, result.attempts, result.final_url) == ("image/png", 200, 1, url)
    assert result.reason is None
    assert result.fetched_at is not None
    assert datetime.datetime.now(datetime.UTC) - result.fetched_at < datetime.timedelta(seconds=30)
    (request,) = hostile.requests["/a.png"]
    assert "User-Agent: ours/1.2 (+mail@a.example)\r\n" in request
    assert "Accept-Encoding: identity\r\n" in request
    assert f"Host: {hostile.host}\r\n" in request


@pytest.mark.parametrize(
    ("status", "reason", "error_class", "asked"),
    [
        ("404 Not Found", Reason.NOT_FOUND, ErrorClass.PERMANENT, 1),
        ("410 Gone", Reason.NOT_FOUND, ErrorClass.PERMANENT, 1),
        ("403 Forbidden", Reason.FORBIDDEN, ErrorClass.PERMANENT, 1),
        ("418 Teapot", Reason.HTTP_ERROR, ErrorClass.PERMANENT, 1),
        ("204 No Content", Reason.HTTP_ERROR, ErrorClass.PERMANENT, 1),
        ("304 Not Modified", Reason.HTTP_ERROR, ErrorClass.PERMANENT, 1),
        ("429 Too Many", Reason.THROTTLED, ErrorClass.TRANSIENT, 2),
        ("500 Error", Reason.SERVER_ERROR, ErrorClass.TRANSIENT, 2),
        ("503 Unavailable", Reason.SERVER_ERROR, ErrorClass.TRANSIENT, 2),
        ("501 Not Implemented", Reason.SERVER_ERROR, ErrorClass.PERMANENT, 1),
    ],
)
def test_statuses(hostile: Any, status: str, reason: Reason, error_class: ErrorClass, asked: int) -> None:
    result = fetch(hostile, hostile.url("/a", response(b"", status=status)))
    assert (result.reason, result.error_class, result.http_status) == (reason, error_class, int(status[:3]))
    assert result.body is None
    assert hostile.asked("/a") == result.attempts == asked


def test_a_flaky_server_is_asked_again(hostile: Any) -> None:
    def flaky(peer: socket.socket, times: int) -> None:
        peer.sendall(response() if times == 3 else response(b"", status="503 Busy"))

    result = fetch(hostile, hostile.url("/a", flaky), attempts=3)
    assert (result.body, result.attempts) == (PNG, 3)


def test_retry_after_is_honoured_within_the_deadline(hostile: Any) -> None:
    def busy(after: str) -> bytes:
        return response(b"", f"Retry-After: {after}", status="429 Slow Down")

    slept: list[float] = []
    rules = Fetch(timeout_s=2.0, attempts=2, allow_hosts=(hostile.host,))
    Fetcher(rules, sleep=slept.append).fetch(hostile.url("/soon", busy("1")))
    assert slept == [1.0]
    result = Fetcher(rules, sleep=slept.append).fetch(hostile.url("/late", busy("3600")))
    assert slept == [1.0]
    assert (result.attempts, result.reason, result.error_class) == (1, Reason.THROTTLED, ErrorClass.TRANSIENT)
    Fetcher(rules, sleep=slept.append).fetch(hostile.url("/date", busy("Wed, 21 Oct 2015 07:28:00 GMT")))
    assert len(slept) == 2
    assert 0 < slept[1] < 1


def test_waits_grow_and_differ() -> None:
    slept: list[float] = []
    rules = Fetch(timeout_s=0.5, attempts=4, allow_hosts=("127.0.0.1:1",))
    result = Fetcher(rules, sleep=slept.append).fetch("http://127.0.0.1:1/refused.png")
    assert (result.reason, result.error_class, result.attempts) == (Reason.CONNECTION, ErrorClass.TRANSIENT, 4)
    assert len(set(slept)) == 3
    assert 0.15 <= slept[0] <= 0.45
    assert 0.6 <= slept[2] <= 1.8


@pytest.mark.parametrize("kind", ["body", "headers", "silence"])
def test_a_dripping_server_meets_the_deadline(hostile: Any, kind: str) -> None:
    def drip(peer: socket.socket, _: int) -> None:
        if kind == "body":
            peer.sendall(response(b"", length=5000) + PNG[:100])
        for _ in range(200):
            time.sleep(0.05)
            if kind != "silence":
                peer.sendall(b"X")

    started_s = time.monotonic()
    result = fetch(hostile, hostile.url("/drip", drip), timeout_s=0.4, attempts=1)
    assert time.monotonic() - started_s < 5, "the server would drip for 10 s"
    assert (result.reason, result.error_class) == (Reason.TIMEOUT, ErrorClass.TRANSIENT)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_truncated_bodies_are_seen(hostile: Any, framing: str) -> None:
    whole = {
        "length": response(PNG[:500], length=len(PNG)),
        "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1000\r\n" + PNG[:500],
    }
    result = fetch(hostile, hostile.url("/cut", whole[framing]))
    assert (result.reason, result.error_class, result.attempts) == (Reason.TRUNCATED, ErrorClass.TRANSIENT, 2)


def test_a_whole_chunked_body(hostile: Any) -> None:
    chunks = f"{len(PNG):x}\r\n".encode() + PNG + b"\r\n0\r\n\r\n"
    url = hostile.url("/chunks", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
    assert fetch(hostile, url).body == PNG


def test_too_many_bytes_by_announcement(hostile: Any) -> None:
    result = fetch(hostile, hostile.url("/big", response(b"", length=10**12)))
    assert (result.reason, result.attempts) == (Reason.TOO_MANY_BYTES, 1)
    assert result.reason is not None
    assert result.reason.outcome is Outcome.DROPPED


def test_an_endless_body_is_cut_at_the_cap(hostile: Any) -> None:
    sent = 0

    def endless(peer: socket.socket, _: int) -> None:
        nonlocal sent
        peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + PNG)
        while sent < 2**30:
            sent += peer.send(b"\0" * 65536)

    tracemalloc.start()
    result = fetch(hostile, hostile.url("/endless", endless), max_bytes=1_000_000, timeout_s=10.0)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.reason is Reason.TOO_MANY_BYTES
    assert sent < 100_000_000
    assert peak_bytes < 10_000_000


def test_a_compressed_bomb_is_cut_at_the_cap(hostile: Any) -> None:
    bomb = gzip.compress(PNG + b"\0" * 50_000_000)
    assert len(bomb) < 100_000
    result = fetch(hostile, hostile.url("/gz", response(bomb, "Content-Encoding: gzip")))
    assert result.reason is Reason.TOO_MANY_BYTES


def test_compression_that_nobody_asked_for(hostile: Any) -> None:
    assert fetch(hostile, hostile.url("/gz", response(gzip.compress(PNG), "Content-Encoding: gzip"))).body == PNG
    cut = fetch(hostile, hostile.url("/cut", response(gzip.compress(PNG)[:900], "Content-Encoding: gzip")))
    assert cut.reason is Reason.TRUNCATED
    for name, body in {"br": PNG, "gzip": b"no gzip at all"}.items():
        other = fetch(hostile, hostile.url(f"/{name}", response(body, f"Content-Encoding: {name}")))
        assert other.reason is Reason.MALFORMED_RESPONSE


def test_a_page_with_status_200_is_no_image(hostile: Any) -> None:
    page = b"<!DOCTYPE html><html>not found</html>" + b" " * 50_000
    result = fetch(hostile, hostile.url("/page", response(page, "Content-Type: image/png")))
    assert (result.reason, result.error_class, result.attempts) == (Reason.NOT_AN_IMAGE, ErrorClass.PERMANENT, 1)
    assert fetch(hostile, hostile.url("/empty", response(b""))).reason is Reason.NOT_AN_IMAGE


def moved(to: str, status: str = "302 Found") -> bytes:
    return response(b"", f"Location: {to}", status=status)


def test_redirects_are_followed(hostile: Any) -> None:
    end = hostile.url("/end.png", response())
    hostile.url("/b/second", moved("../end.png", "308 Permanent Redirect"))
    result = fetch(hostile, hostile.url("/first", moved("/b/second", "301 Moved")))
    assert (result.body, result.final_url, result.attempts) == (PNG, end, 1)


def test_redirects_are_capped(hostile: Any) -> None:
    result = fetch(hostile, hostile.url("/loop", moved("/loop")), max_redirects=3)
    assert (result.reason, result.error_class) == (Reason.TOO_MANY_REDIRECTS, ErrorClass.PERMANENT)
    assert hostile.asked("/loop") == 4
    assert fetch(hostile, hostile.url("/once", moved("/end")), max_redirects=0).reason is Reason.TOO_MANY_REDIRECTS


@pytest.mark.parametrize(
    ("to", "reason"),
    [
        ("http://127.0.0.1:1/", Reason.ADDRESS_NOT_ALLOWED),
        ("http://localhost/", Reason.ADDRESS_NOT_ALLOWED),
        ("http://169.254.169.254/latest/meta-data/", Reason.ADDRESS_NOT_ALLOWED),
        ("//0x7f000001/", Reason.ADDRESS_NOT_ALLOWED),
        ("file:///etc/passwd", Reason.SCHEME_NOT_ALLOWED),
        ("http://[::1/", Reason.INVALID_URL),
        ("http://u:p@127.0.0.1/", Reason.INVALID_URL),
    ],
)
def test_redirects_into_the_machine_are_refused(hostile: Any, to: str, reason: Reason) -> None:
    result = fetch(hostile, hostile.url("/door", moved(to)))
    assert (result.reason, result.attempts, result.http_status) == (reason, 1, 302)


def test_a_second_server_on_loopback_is_not_reached(hostile: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as inner:
        inner.settimeout(0.3)
        result = fetch(hostile, hostile.url("/door", moved(f"http://127.0.0.1:{inner.getsockname()[1]}/secret")))
        with pytest.raises(TimeoutError):
            inner.accept()
    assert result.reason is Reason.ADDRESS_NOT_ALLOWED


def test_loopback_is_refused_by_default(hostile: Any) -> None:
    result = fetch(hostile, hostile.url("/a", response()), allow_hosts=())
    assert (result.reason, hostile.asked("/a")) == (Reason.ADDRESS_NOT_ALLOWED, 0)
    assert fetch(hostile, "file:///etc/passwd").reason is Reason.SCHEME_NOT_ALLOWED
    assert fetch(hostile, "").reason is Reason.INVALID_URL


def test_opt_outs_are_honoured_and_kept_as_evidence(hostile: Any) -> None:
    url = hostile.url("/no", response(PNG, "X-Robots-Tag: noai, noimageai"))
    result = fetch(hostile, url)
    assert (result.reason, result.body, result.http_status) == (Reason.OPT_OUT, None, 200)
    assert result.opt_out is not None
    assert (result.opt_out.signal, result.opt_out.evidence) == ("x-robots-tag", "X-Robots-Tag: noai, noimageai")
    assert fetch(hostile, url, opt_out=False).body == PNG
    per_agent = hostile.url("/agent", response(PNG, "X-Robots-Tag: ours: noai"))
    assert fetch(hostile, per_agent, user_agent="ours/2").reason is Reason.OPT_OUT
    assert fetch(hostile, per_agent, user_agent="theirs/2").body == PNG


def test_what_a_redirect_refuses_is_refused(hostile: Any) -> None:
    hostile.url("/end.png", response())
    url = hostile.url("/no", response(b"", "Location: /end.png", "tdm-reservation: 1", status="302 Found"))
    assert fetch(hostile, url).reason is Reason.OPT_OUT
    assert hostile.asked("/end.png") == 0


def test_an_error_page_that_is_not_to_be_indexed_is_an_error(hostile: Any) -> None:
    result = fetch(hostile, hostile.url("/a", response(b"", "X-Robots-Tag: noindex", status="503 Busy")))
    assert (result.reason, result.attempts) == (Reason.SERVER_ERROR, 2)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", Reason.CONNECTION),
        (b"SSH-2.0-OpenSSH_9.6\r\n", Reason.MALFORMED_RESPONSE),
        (b"HTTP/1.1 200 OK\r\n" + b"".join(b"A%d: b\r\n" % i for i in range(500)) + b"\r\n", Reason.MALFORMED_RESPONSE),
        (b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", Reason.MALFORMED_RESPONSE),
    ],
)
def test_what_is_no_http(hostile: Any, answer: bytes, reason: Reason) -> None:
    assert fetch(hostile, hostile.url("/a", answer)).reason is reason


def test_a_reset_connection_is_transient(hostile: Any) -> None:
    def reset(peer: socket.socket, _: int) -> None:
        peer.sendall(response(PNG[:200], length=len(PNG)))
        time.sleep(0.05)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        peer.close()

    result = fetch(hostile, hostile.url("/reset", reset))
    assert result.reason in {Reason.CONNECTION, Reason.TRUNCATED}
    assert (result.error_class, result.attempts) == (ErrorClass.TRANSIENT, 2)


def test_unknown_names(hostile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for code, error_class in ((socket.EAI_NONAME, ErrorClass.PERMANENT), (socket.EAI_AGAIN, ErrorClass.TRANSIENT)):

        def fail(*_: object, code: int = code, **__: object) -> None:
            raise socket.gaierror(code, "no such name")

        monkeypatch.setattr(socket, "getaddrinfo", fail)
        result = fetch(hostile, "http://nowhere.example/a.png")
        assert (result.reason, result.error_class) == (Reason.DNS, error_class)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", str(path), "-out", f"{path}.crt", "-days", "2", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def test_https_checks_certificates(hostile: Any, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    plain = hostile._handle

    def handle(peer: socket.socket) -> None:
        with context.wrap_socket(peer, server_side=True) as secured:
            plain(secured)

    monkeypatch.setattr(hostile, "_handle", handle)
    url = hostile.url("/a.png", response()).replace("http:", "https:")
    result = fetch(hostile, url)
    assert (result.reason, result.error_class, result.attempts) == (Reason.TLS, ErrorClass.PERMANENT, 1)
    trusting = ssl.create_default_context(cafile=certificate)
    monkeypatch.setattr(connection, "tls_context", lambda: trusting)
    assert fetch(hostile, url).body == PNG
    assert ipaddress.ip_address(hostile.host.partition(":")[0]).is_loopback


def test_plain_http_behind_https_is_an_error(hostile: Any) -> None:
    url = hostile.url("/a.png", response()).replace("http:", "https:")
    hostile.answers["/a.png"] = lambda peer, _: None
    monkey = hostile._handle

    def shout(peer: socket.socket) -> None:
        peer.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        peer.recv(4096)

    hostile._handle = shout
    try:
        assert fetch(hostile, url, attempts=1).reason is Reason.TLS
    finally:
        hostile._handle = monkey
