"""Paths and URLs that a recipe names: whether they can be any, without looking whether something is there."""

from __future__ import annotations

import ipaddress
import posixpath
import re
from urllib.parse import urlsplit

import fsspec

from pipelines.recipe.problems import Findings, meant

MAX_PART_BYTES = 255
"""Most bytes of one part of a path, on every file system of Linux."""
ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):(?!:|//)/?")
SLASHLESS = {"file", "local", "data"}
"""Schemes whose URLs need no two slashes."""
SOMEWHERE = "/somewhere" * 64
"""Stands for the working folder, so that paths that lead up from it can be compared."""


def schemes(url: str) -> list[str]:
    """The scheme of each part of a chained URL that has one: ["s3"] for "simplecache::s3://bucket"."""
    return [part.partition("://")[0] for part in url.split("::") if "://" in part]


def check_scheme(where: str, url: str, findings: Findings) -> bool:
    """Whether fsspec knows drivers for the URL, and it leads somewhere; a path has no scheme."""
    known = fsspec.available_protocols()
    meant_as = ONE_SLASH.match(url)
    if meant_as is not None and meant_as[1].lower() in set(known) - SLASHLESS:
        rest = url[meant_as.end() :]
        findings.refuse(
            where,
            f"{url!r} is a path as it stands, since a URL has two slashes: give {meant_as[1]}://{rest}, or"
            f" ./{url} for a folder of that name",
        )
        return False
    if url.endswith("://"):
        findings.refuse(where, f"{url!r} has nothing after its scheme; give it in full, such as s3://bucket/prefix")
        return False
    if not _is_remote(url) and (long := too_long(url)):
        findings.refuse(where, f"{long}; give shorter names")
        return False
    unknown = [scheme for scheme in schemes(url) if scheme not in known]
    if unknown:
        remedy = meant(unknown[0], known) or "; give a path, or a URL that fsspec has a driver for (s3://, gs://, ...)"
        findings.refuse(where, f"{url!r}: no driver knows {unknown[0]}://{remedy}")
    return not unknown


def is_authority(entry: str) -> bool:
    """Whether this is "host:port"."""
    try:
        parts = urlsplit(f"//{entry}")
        return bool(parts.port and parts.netloc == entry and parts.username is None and is_host(parts.hostname))
    except ValueError:
        return False


def is_host(host: str | None) -> bool:
    """Whether this can be a machine's name or address, without asking whether there is one."""
    if not host:
        return False
    try:
        if ":" in host:
            ipaddress.IPv6Address(host)
        else:
            host.encode("idna")
    except ValueError:  # a label that is empty or too long, too
        return False
    return host.isprintable() and not set(host) & set(" *?[](){}<>,;'\"\\|^`")


def too_long(path: str) -> str:
    """Why no file system has this path; empty if one may."""
    part = max(path.split("/"), key=lambda part: len(part.encode()))
    if len(part.encode()) <= MAX_PART_BYTES:
        return ""
    return f"{part[:40] + '...'!r} is {len(part.encode())} bytes long: a part of a path has at most {MAX_PART_BYTES}"


def is_seen_within(place: str, folder: str) -> bool:
    """Whether a walk through `folder`, which passes hidden ones over, comes by `place`, as far as the texts tell."""
    if _is_remote(place) or _is_remote(folder) or posixpath.isabs(place) != posixpath.isabs(folder):
        return False
    way = posixpath.relpath(posixpath.join(SOMEWHERE, place), posixpath.join(SOMEWHERE, folder)).split("/")
    return way[0] != ".." and not any(part.startswith(".") for part in way if part != ".")


def _is_remote(url: str) -> bool:
    return "://" in url or "::" in url
