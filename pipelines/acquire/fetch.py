"""Fetch one URL as a stranger on the hostile web should: honest, patient within bounds, and never further than allowed.

Addresses are checked before each connection, redirects included; time, bytes and redirects are capped before they are
spent; transient failures are tried again; opt-out signals are honoured. What is fetched is only known to begin as an
image does: decoding is `pipelines.acquire.decode`'s matter.

Opt-out signals and sizes are noted even where no rule asks for them, so that a rule that comes later needs no request.
"""

from __future__ import annotations

import datetime
import email.utils
import http.client
import logging
import random
import socket
import ssl
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import urljoin

from pipelines.acquire.addresses import AddressBook, AddressNotAllowed, InvalidUrl, SchemeNotAllowed, parse_url
from pipelines.acquire.connection import BUFFER_BYTES, Deadline, get
from pipelines.acquire.filter import opt_out_message, too_many_bytes_message
from pipelines.acquire.optout import OptOut, find_opt_out
from pipelines.acquire.sniff import HEAD_BYTES, sniff
from pipelines.dataset.ledger import ErrorClass, Reason
from pipelines.recipe import Fetch

REDIRECTS = frozenset({301, 302, 303, 307, 308})
TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
BACKOFF_S = 0.3
MAX_BACKOFF_S = 5.0
MAX_MESSAGE_CHARS = 300

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchResult:
    """What became of one URL. `body` is there exactly if `reason` is None.

    `size_bytes` is the body's, or what a good answer announced of it; None where that was over the limit.
    """

    body: bytes | None = None
    size_bytes: int | None = None
    mime: str | None = None
    reason: Reason | None = None
    message: str | None = None
    error_class: ErrorClass | None = None
    http_status: int | None = None
    final_url: str | None = None
    attempts: int = 0
    opt_out: OptOut | None = None
    fetched_at: datetime.datetime | None = None


class _Refused(Exception):
    """An attempt that ended without a body."""

    def __init__(
        self,
        reason: Reason,
        message: str,
        error_class: ErrorClass = ErrorClass.PERMANENT,
        *,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.error_class = error_class
        self.retry_after_s = retry_after_s


class Fetcher:
    """Fetches URLs under the recipe's rules. One for each process; safe to use from many threads.

    `sleep` waits before another attempt; none is made if it returns true.

    Raises `ValueError` if an entry of `allow_hosts` is not "host:port".
    """

    def __init__(self, rules: Fetch, sleep: Callable[[float], object] = time.sleep) -> None:
        self._rules = rules
        self._sleep = sleep
        self._address_book = AddressBook(rules.allow_hosts)
        self._agent = rules.user_agent.partition("/")[0].strip()
        self._headers = {
            "User-Agent": f"{rules.user_agent} (+{rules.contact})" if rules.contact else rules.user_agent,
            "Accept": "image/*,*/*;q=0.1",
            "Accept-Encoding": "identity",
        }

    def fetch(self, url: str) -> FetchResult:
        """Never raises for what a server does or a list says."""
        for attempt in range(1, self._rules.attempts + 1):
            progress = _Progress(url)
            try:
                body, mime = self._attempt(progress)
                return replace(progress.result(attempt), body=body, size_bytes=len(body), mime=mime)
            except Exception as error:  # noqa: BLE001 - the boundary of one sample: it counts, and the others go on
                refused = _refusal(error)
            wait_s = self._wait_s(refused, attempt)
            if wait_s is None or self._sleep(wait_s):
                break
        return replace(
            progress.result(attempt),
            reason=refused.reason,
            message=str(refused)[:MAX_MESSAGE_CHARS],
            error_class=refused.error_class,
            size_bytes=None if refused.reason is Reason.TOO_MANY_BYTES else progress.announced_bytes,
        )

    def check_unchanged(self) -> None:
        """Nothing: what a URL leads to is what it is when it is asked for."""

    def _wait_s(self, refused: _Refused, attempt: int) -> float | None:
        """Seconds until the next attempt; None if there is none, or if the server wants us back too late."""
        if refused.error_class is ErrorClass.PERMANENT or attempt == self._rules.attempts:
            return None
        wait_s = min(BACKOFF_S * 2.0 ** (attempt - 1), MAX_BACKOFF_S) * random.uniform(0.5, 1.5)
        if refused.retry_after_s is None:
            return wait_s
        return max(wait_s, refused.retry_after_s) if refused.retry_after_s <= self._rules.timeout_s else None

    def _attempt(self, progress: _Progress) -> tuple[bytes, str]:
        """Body and MIME type."""
        deadline = Deadline(self._rules.timeout_s)
        for _ in range(self._rules.max_redirects + 1):
            target = parse_url(progress.url)
            addresses = self._address_book.addresses(target, deadline.left_s())
            with get(target, addresses, self._headers, deadline) as response:
                progress.http_status = response.status
                location = response.headers.get("Location")
                if response.status in {http.client.OK, *REDIRECTS}:  # an error's page speaks for itself alone
                    self._check_opt_out(response, progress)
                if response.status not in REDIRECTS or not location:
                    return self._body(response, progress)
            progress.url = _redirected(progress.url, location)
        raise _Refused(Reason.TOO_MANY_REDIRECTS, f"more than {self._rules.max_redirects} redirects")

    def _check_opt_out(self, response: http.client.HTTPResponse, progress: _Progress) -> None:
        found = find_opt_out(response.headers, self._agent, datetime.datetime.now(datetime.UTC))
        if found is None or progress.opt_out is not None:
            return
        progress.opt_out = replace(found, http_status=response.status)
        if self._rules.opt_out:
            raise _Refused(Reason.OPT_OUT, opt_out_message(found.evidence))

    def _body(self, response: http.client.HTTPResponse, progress: _Progress) -> tuple[bytes, str]:
        if response.status != http.client.OK:
            raise _refused_status(response)
        limit = self._rules.max_bytes
        progress.announced_bytes = response.length
        if response.length is not None and response.length > limit:
            raise _Refused(Reason.TOO_MANY_BYTES, too_many_bytes_message(limit))
        inflate = _inflater(response.headers.get("Content-Encoding", ""))
        body = bytearray()
        mime: str | None = None
        while chunk := response.read(BUFFER_BYTES):
            body += chunk if inflate is None else inflate.decompress(chunk, limit + 1 - len(body))
            if len(body) > limit or (inflate is not None and inflate.unconsumed_tail):
                raise _Refused(Reason.TOO_MANY_BYTES, too_many_bytes_message(limit))
            if mime is None and len(body) >= HEAD_BYTES:
                mime = _image_type(bytes(body[:HEAD_BYTES]))
        if response.length or (inflate is not None and not inflate.eof):
            message = f"the body ended early, after {len(body)} bytes"
            raise _Refused(Reason.TRUNCATED, message, ErrorClass.TRANSIENT)
        return bytes(body), mime or _image_type(bytes(body))


class _Progress:
    """How far an attempt has come: what is told of it however it ends."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.http_status: int | None = None
        self.announced_bytes: int | None = None
        self.opt_out: OptOut | None = None

    def result(self, attempts: int) -> FetchResult:
        return FetchResult(
            http_status=self.http_status,
            final_url=self.url,
            attempts=attempts,
            opt_out=self.opt_out,
            fetched_at=datetime.datetime.now(datetime.UTC),
        )


def _redirected(url: str, location: str) -> str:
    """http.client hands out headers as Latin-1, whatever they are; UTF-8 is what is found in the wild."""
    try:
        return urljoin(url, location.encode("latin-1", "replace").decode("utf-8", "replace"))
    except ValueError as error:
        raise InvalidUrl(f"redirected to {location[:100]!r}, which is no URL: {error}") from error


def _image_type(head: bytes) -> str:
    mime = sniff(head)
    if mime is None:
        raise _Refused(Reason.NOT_AN_IMAGE, f"begins with {head[:16]!r}, as no image does")
    return mime


def _inflater(encoding: str) -> zlib._Decompress | None:
    """We ask for none, but some servers compress regardless."""
    encoding = encoding.strip().lower()
    if encoding in {"", "identity"}:
        return None
    if encoding in {"gzip", "x-gzip", "deflate"}:
        return zlib.decompressobj(zlib.MAX_WBITS | 32)
    raise _Refused(Reason.MALFORMED_RESPONSE, f"content encoding {encoding!r} was not asked for")


def _refused_status(response: http.client.HTTPResponse) -> _Refused:
    status = response.status
    if status == 429:
        reason = Reason.THROTTLED
    elif status >= 500:
        reason = Reason.SERVER_ERROR
    elif status in {404, 410}:
        reason = Reason.NOT_FOUND
    elif status in {401, 403, 451}:
        reason = Reason.FORBIDDEN
    else:
        reason = Reason.HTTP_ERROR
    error_class = ErrorClass.TRANSIENT if status in TRANSIENT_STATUSES else ErrorClass.PERMANENT
    retry_after_s = _seconds_until(response.headers.get("Retry-After", ""))
    return _Refused(reason, f"HTTP {status} {response.reason}".strip(), error_class, retry_after_s=retry_after_s)


def _seconds_until(retry_after: str) -> float | None:
    if retry_after.strip().isdigit():
        return float(retry_after)
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
    except (TypeError, ValueError):
        return None
    date = date if date.tzinfo is not None else date.replace(tzinfo=datetime.UTC)
    return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())


# The first that fits counts: each subclass stands before its parent.
_MEANINGS: tuple[tuple[type[Exception], Reason, ErrorClass], ...] = (
    (SchemeNotAllowed, Reason.SCHEME_NOT_ALLOWED, ErrorClass.PERMANENT),
    (AddressNotAllowed, Reason.ADDRESS_NOT_ALLOWED, ErrorClass.PERMANENT),
    (InvalidUrl, Reason.INVALID_URL, ErrorClass.PERMANENT),
    (TimeoutError, Reason.TIMEOUT, ErrorClass.TRANSIENT),
    (ssl.SSLCertVerificationError, Reason.TLS, ErrorClass.PERMANENT),
    (ssl.SSLError, Reason.TLS, ErrorClass.TRANSIENT),
    (http.client.IncompleteRead, Reason.TRUNCATED, ErrorClass.TRANSIENT),
    (OSError, Reason.CONNECTION, ErrorClass.TRANSIENT),
    (http.client.HTTPException, Reason.MALFORMED_RESPONSE, ErrorClass.PERMANENT),
    (zlib.error, Reason.MALFORMED_RESPONSE, ErrorClass.PERMANENT),
)


def _refusal(error: Exception) -> _Refused:
    if isinstance(error, _Refused):
        return error
    message = str(error) or type(error).__name__
    if isinstance(error, socket.gaierror):
        again = error.errno == socket.EAI_AGAIN
        return _Refused(Reason.DNS, message, ErrorClass.TRANSIENT if again else ErrorClass.PERMANENT)
    for kind, reason, error_class in _MEANINGS:
        if isinstance(error, kind):
            return _Refused(reason, message, error_class)
    logger.error("a fetch ended in an unexpected way", exc_info=error)
    return _Refused(Reason.INTERNAL_ERROR, f"{type(error).__name__}: {message}")
