"""A ledger's row, out of what became of a URL: asked for now, not asked for at all, or asked for earlier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.acquire.fetch import FetchResult
from pipelines.dataset.ledger import RESULT_COLUMNS, ErrorClass, Outcome, Reason

DOWNLOAD, RESIZE = "failed_to_download", "failed_to_resize"
"""img2dataset's words for where a row ended."""
UNREAD = frozenset({Reason.OPT_OUT, Reason.TOO_MANY_BYTES})
"""Reasons of answers that are refused before their bytes are looked at."""
OF_THE_IMAGE = ("width", "height", "sha256", "stored_sha256", "phash")
OF_THE_BYTES = ("mime", "orientation", "original_width", "original_height", "original_bytes")

Row = dict[str, Any]


@dataclass(frozen=True)
class ImageFacts:
    """What was learned of one image's bytes, and why they were refused."""

    mime: str | None = None
    original_width: int | None = None
    original_height: int | None = None
    orientation: int | None = None
    phash: int | None = None
    reason: Reason | None = None


def fetched(fetch: FetchResult, image: ImageFacts, stored: Mapping[str, Any], manners: str | None) -> Row:
    """`RESULT_COLUMNS` of a row; `stored` are img2dataset's: status, error_message, width, height, sha256."""
    reason = fetch.reason or image.reason
    failed = reason is not None and reason.outcome is Outcome.FAILED
    return {
        **{name: stored.get(name) for name in ("status", "error_message", "width", "height", "sha256")},
        "original_width": image.original_width,
        "original_height": image.original_height,
        "outcome": reason.outcome if reason else Outcome.KEPT,
        "reason": reason,
        "error_class": (fetch.error_class or ErrorClass.PERMANENT) if failed else None,
        "http_status": fetch.http_status,
        "opt_out": asdict(fetch.opt_out) if fetch.opt_out else None,
        "mime": fetch.mime,
        "original_bytes": fetch.size_bytes,
        "phash": image.phash,
        "orientation": image.orientation,
        "final_url": fetch.final_url,
        "fetched_at": fetch.fetched_at,
        "attempts": fetch.attempts,
        "manners": manners,
    }


def unasked(reason: Reason, message: str) -> Row:
    """`RESULT_COLUMNS` of a row for which nothing is asked."""
    return fetched(FetchResult(reason=reason), ImageFacts(), {"status": DOWNLOAD, "error_message": message}, None)


def as_it_was(earlier: Mapping[str, Any]) -> Row:
    """`RESULT_COLUMNS` of an earlier row."""
    return {name: earlier[name] for name in RESULT_COLUMNS}


def dropped_now(earlier: Mapping[str, Any], reason: Reason, message: str) -> Row:
    """`RESULT_COLUMNS` of an earlier row that would be dropped for `reason` if it were asked for today."""
    row = as_it_was(earlier) | dict.fromkeys(OF_THE_IMAGE)
    if reason in UNREAD:
        row |= dict.fromkeys(OF_THE_BYTES)
    if reason is Reason.OPT_OUT:
        row["http_status"] = earlier["opt_out"]["http_status"]
    return row | {
        "status": DOWNLOAD if reason in UNREAD else RESIZE,
        "error_message": message,
        "outcome": Outcome.DROPPED,
        "reason": reason,
        "error_class": None,
    }
