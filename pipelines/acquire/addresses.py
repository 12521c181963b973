"""Which addresses may be fetched: those of the public Internet, and what an explicit allow-list adds.

A name is resolved once; every address that is not global is dropped; the caller connects to one that is left, and so to
one that was checked. To be asked again at each redirect.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from pipelines.dataset.uid import DEFAULT_PORTS
from pipelines.recipe.places import is_authority

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

CACHE_TTL_S = 60.0
MAX_CACHED_HOSTS = 20_000

# Beyond what `ipaddress` calls not global, which depends on Python's version.
REFUSED_V4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            "0.0.0.0/8",
            "100.64.0.0/10",  # carrier-grade NAT
            "168.63.129.16/32",  # a public address that is a cloud's host agent
            "192.0.0.0/24",
            "192.88.99.0/24",  # 6to4 relays
            "198.18.0.0/15",
            "224.0.0.0/4",
            "240.0.0.0/4",
        ),
    )
)
GLOBAL_UNICAST_V6 = ipaddress.IPv6Network("2000::/3")
REFUSED_V6 = tuple(
    map(
        ipaddress.IPv6Network,
        (
            "2001::/23",  # protocol assignments, among them Teredo
            "2001:db8::/32",
            "2002::/16",  # 6to4
            "3fff::/20",
        ),
    )
)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


class InvalidUrl(Exception):
    """Not a URL that can be fetched; the message says why."""


class SchemeNotAllowed(Exception):
    """The URL's scheme is neither http nor https."""


class AddressNotAllowed(Exception):
    """The host has no address that may be fetched."""


@dataclass(frozen=True)
class Target:
    """A URL taken apart. `host` is ASCII, `path` has the query; `authority` is what the Host header says."""

    url: str
    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True)
class SocketAddress:
    """Where to connect: what `socket.socket` and `connect` take."""

    family: int
    address: Any


def parse_url(url: str) -> Target:
    """Take a URL apart as a browser would: blanks and non-ASCII characters in the path are percent-encoded.

    Raises:
        SchemeNotAllowed: neither http nor https.
        InvalidUrl: no host, credentials in it, a host or port that can't be.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise InvalidUrl(f"not a URL: {error}") from error
    if not parts.scheme:
        raise InvalidUrl(f"{url[:100]!r} has no scheme")
    if parts.scheme not in DEFAULT_PORTS:
        raise SchemeNotAllowed(f"scheme {parts.scheme!r} is not http or https")
    if "@" in parts.netloc:
        raise InvalidUrl("the URL has credentials in it")
    try:
        host = host if host.isascii() else host.encode("idna").decode("ascii")
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._[]")
        query = quote(parts.query, safe="/?%:@!$&'()*+,;=~-._[]")
    except UnicodeError as error:
        raise InvalidUrl(f"the host or the path can't be encoded: {error}") from error
    if not host or not all(character.isalnum() or character in "-._:" for character in host):
        raise InvalidUrl(f"{host!r} is not a host")
    path = f"{path}?{query}" if query else path
    return Target(url, parts.scheme, host, port if port is not None else DEFAULT_PORTS[parts.scheme], path)


def is_global(address: IPAddress) -> bool:
    """Whether the address is a host's on the public Internet.

    IPv4 inside IPv6: mapped and NAT64 forms are judged by the IPv4 address; 6to4, Teredo, compatible and local NAT64
    forms are refused.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not any(address in network for network in REFUSED_V4)
    if address.ipv4_mapped is not None:
        return is_global(address.ipv4_mapped)
    if address in NAT64:
        return is_global(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if address not in GLOBAL_UNICAST_V6 or address.scope_id:
        return False
    return address.is_global and not any(address in network for network in REFUSED_V6)


class AddressBook:
    """Resolves hosts to addresses that may be fetched. One for each process; safe to use from many threads.

    `allow_hosts` are "host:port" entries whose addresses are not judged.
    """

    def __init__(self, allow_hosts: Iterable[str] = ()) -> None:
        self._allowed = frozenset(map(_host_and_port, allow_hosts))
        self._cached: dict[tuple[str, int], tuple[float, list[SocketAddress]]] = {}

    def addresses(self, target: Target, timeout_s: float) -> list[SocketAddress]:
        """The addresses of `target`'s host that may be fetched, in the resolver's order; never empty.

        Raises:
            AddressNotAllowed: the host has addresses, but none that may be fetched.
            socket.gaierror: the host can't be resolved.
            TimeoutError: not within `timeout_s`.
        """
        found = self._resolve(target.host, target.port, timeout_s)
        if (target.host.lower(), target.port) in self._allowed:
            return found
        allowed = [entry for entry in found if is_global(ipaddress.ip_address(entry.address[0]))]
        if not allowed:
            shown = ", ".join(str(entry.address[0]) for entry in found[:3])
            raise AddressNotAllowed(f"{target.host} is at {shown}, which is no public address")
        return allowed

    def _resolve(self, host: str, port: int, timeout_s: float) -> list[SocketAddress]:
        try:  # literals, in all the forms that `inet_aton` takes ("127.1", "0x7f000001"), need no resolver
            return _lookup(host, port, socket.AI_NUMERICHOST)
        except (socket.gaierror, UnicodeError):
            pass
        cached = self._cached.get((host, port))
        now_s = time.monotonic()
        if cached is not None and now_s < cached[0]:
            return cached[1]
        found = _lookup_within(host, port, timeout_s)
        if len(self._cached) >= MAX_CACHED_HOSTS:
            self._cached.clear()
        self._cached[host, port] = (now_s + CACHE_TTL_S, found)
        return found


def _host_and_port(entry: str) -> tuple[str, int]:
    """Raises `ValueError` unless `entry` is "host:port"."""
    parts = urlsplit(f"//{entry}")
    if not is_authority(entry) or parts.hostname is None or parts.port is None:
        raise ValueError(f"acquire.fetch.allow_hosts: {entry!r} is not host:port, such as 127.0.0.1:8377")
    return parts.hostname.lower(), parts.port


def _lookup(host: str, port: int, flags: int = 0) -> list[SocketAddress]:
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [SocketAddress(family, address) for family, _, _, _, address in entries]


def _lookup_within(host: str, port: int, timeout_s: float) -> list[SocketAddress]:
    """`getaddrinfo` knows no deadline: it runs in a thread, which is left behind if it takes too long."""
    answer: list[list[SocketAddress] | OSError | UnicodeError] = []

    def look_up() -> None:
        try:
            answer.append(_lookup(host, port))
        except (OSError, UnicodeError) as error:
            answer.append(error)

    thread = threading.Thread(target=look_up, daemon=True, name=f"resolve {host}")
    thread.start()
    thread.join(timeout_s)
    if not answer:
        raise TimeoutError(f"{host} was not resolved within {timeout_s:.1f} s")
    if isinstance(answer[0], UnicodeError):
        raise socket.gaierror(socket.EAI_NONAME, f"{host!r} is not a name that can be resolved")
    if isinstance(answer[0], OSError):
        raise answer[0]
    return answer[0]
