"""Paths and URLs that a recipe names: whether they can be any, without looking whether something is there."""

from __future__ import annotations

from urllib.parse import urlsplit

import fsspec

from pipelines.recipe.problems import Findings, meant


def schemes(url: str) -> list[str]:
    """Of each part of a chained URL that has one: ["s3"] for "simplecache::s3://bucket"."""
    return [part.partition("://")[0] for part in url.split("::") if "://" in part]


def check_scheme(where: str, url: str, findings: Findings) -> bool:
    """Whether fsspec knows drivers for the URL; a path has no scheme."""
    known = fsspec.available_protocols()
    unknown = [scheme for scheme in schemes(url) if scheme not in known]
    if unknown:
        remedy = meant(unknown[0], known) or "; give a path, or a URL that fsspec has a driver for (s3://, gs://, ...)"
        findings.refuse(where, f"{url!r}: no driver knows {unknown[0]}://{remedy}")
    return not unknown


def is_authority(entry: str) -> bool:
    """Whether this is "host:port"."""
    try:
        parts = urlsplit(f"//{entry}")
        return bool(parts.hostname and parts.port and parts.netloc == entry and parts.username is None)
    except ValueError:
        return False
