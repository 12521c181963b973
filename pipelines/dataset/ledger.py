"""The ledger: what became of every URL or file, with a reason from an enumeration, and how the rows are counted.

Columns that img2dataset knows have its names and meanings; ours stand beside them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from enum import StrEnum
from typing import Any

import pyarrow as pa

from pipelines.artifacts import Counts


class Outcome(StrEnum):
    """Dropped: a rule of ours says no. Failed: it could not be had."""

    KEPT = "kept"
    DROPPED = "dropped"
    FAILED = "failed"


class ErrorClass(StrEnum):
    """Whether trying again later may help."""

    TRANSIENT = "transient"
    PERMANENT = "permanent"


class Reason(StrEnum):
    """Why a URL or file was not kept; `outcome` says on whose account."""

    CAPTION_EMPTY = "caption_empty"
    CAPTION_TOO_SHORT = "caption_too_short"
    SCHEME_NOT_ALLOWED = "scheme_not_allowed"
    ADDRESS_NOT_ALLOWED = "address_not_allowed"
    OPT_OUT = "opt_out"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"
    TOO_SMALL = "too_small"
    TOO_ELONGATED = "too_elongated"
    OUTSIDE_FOLDER = "outside_folder"
    REPEATED = "repeated"

    INVALID_URL = "invalid_url"
    DNS = "dns"
    CONNECTION = "connection"
    TLS = "tls"
    TIMEOUT = "timeout"
    TRUNCATED = "truncated"
    MALFORMED_RESPONSE = "malformed_response"
    THROTTLED = "throttled"
    SERVER_ERROR = "server_error"
    NOT_FOUND = "not_found"
    FORBIDDEN = "forbidden"
    HTTP_ERROR = "http_error"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    NOT_AN_IMAGE = "not_an_image"
    UNREADABLE = "unreadable"
    UNSUPPORTED_FORMAT = "unsupported_format"
    DECODE_ERROR = "decode_error"
    INTERNAL_ERROR = "internal_error"

    @property
    def outcome(self) -> Outcome:
        return Outcome.DROPPED if self in DROPS else Outcome.FAILED


DROPS = frozenset(
    {
        Reason.CAPTION_EMPTY,
        Reason.CAPTION_TOO_SHORT,
        Reason.SCHEME_NOT_ALLOWED,
        Reason.ADDRESS_NOT_ALLOWED,
        Reason.OPT_OUT,
        Reason.TOO_MANY_BYTES,
        Reason.TOO_MANY_PIXELS,
        Reason.TOO_SMALL,
        Reason.TOO_ELONGATED,
        Reason.OUTSIDE_FOLDER,
        Reason.REPEATED,
    }
)
UNASKED = frozenset({Reason.CAPTION_EMPTY, Reason.CAPTION_TOO_SHORT, Reason.REPEATED})
"""Reasons of rows that are judged by the list alone: nothing was asked for."""

# What a source may bring along that is a column of ours.
SOURCE_COLUMNS = (
    pa.field("url", pa.string()),
    pa.field("caption", pa.string()),
    pa.field("uid", pa.string()),
)
OPTIONAL_SOURCE_COLUMNS = (
    pa.field("licence", pa.string()),
    pa.field("language", pa.string()),
)
IMG2DATASET_COLUMNS = (
    pa.field("key", pa.string()),
    pa.field("status", pa.string()),
    pa.field("error_message", pa.string()),
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("original_width", pa.int32()),
    pa.field("original_height", pa.int32()),
    pa.field("sha256", pa.string()),
)
OUR_COLUMNS = (
    pa.field("outcome", pa.string(), nullable=False),
    pa.field("reason", pa.string()),
    pa.field("error_class", pa.string()),
    pa.field("http_status", pa.int32()),
    pa.field("opt_out", pa.struct([("signal", pa.string()), ("evidence", pa.string()), ("http_status", pa.int32())])),
    pa.field("mime", pa.string()),
    pa.field("original_bytes", pa.int64()),
    pa.field("stored_sha256", pa.string()),
    pa.field("phash", pa.uint64()),
    pa.field("orientation", pa.int8()),
    pa.field("final_url", pa.string()),
    pa.field("fetched_at", pa.timestamp("ms", tz="UTC")),
    pa.field("attempts", pa.int16()),
    pa.field("manners", pa.string()),
    pa.field("shard", pa.string(), nullable=False),
)
RESERVED_NAMES = frozenset(field.name for field in (*SOURCE_COLUMNS, *IMG2DATASET_COLUMNS, *OUR_COLUMNS))
RESULT_COLUMNS = tuple(
    field.name for field in (*IMG2DATASET_COLUMNS, *OUR_COLUMNS) if field.name not in {"key", "shard"}
)
"""What became of a row, wherever it lies."""
VOLATILE_COLUMNS = ("fetched_at", "attempts", "final_url", "manners")
"""What may differ between two runs that got the same responses."""


def ledger_schema(source_schema: Any) -> Any:
    """Schema of a ledger for rows of `source_schema` (url, caption, uid, and the source's further columns)."""
    missing = [field for field in OPTIONAL_SOURCE_COLUMNS if field.name not in source_schema.names]
    return pa.schema([*source_schema, *IMG2DATASET_COLUMNS, *OUR_COLUMNS, *missing])


def count(ledger: Any) -> Counts:
    """What became of the ledger's rows; the sums hold if every row has an outcome, and a reason unless kept."""
    outcomes = ledger.column("outcome").to_pylist()
    reasons = ledger.column("reason").to_pylist()
    rows = Counter(zip(outcomes, reasons, strict=True))
    return Counts(
        total=ledger.num_rows,
        kept=sum(number for (outcome, _), number in rows.items() if outcome == Outcome.KEPT),
        dropped={r: n for (outcome, r), n in sorted(rows.items(), key=str) if outcome == Outcome.DROPPED},
        failed={r: n for (outcome, r), n in sorted(rows.items(), key=str) if outcome == Outcome.FAILED},
    )


def content_digest(ledger: Any) -> str:
    """sha256 over all that two runs with the same responses agree on: every column but `VOLATILE_COLUMNS`."""
    hasher = hashlib.sha256()
    for name in ledger.column_names:
        if name not in VOLATILE_COLUMNS:
            hasher.update(repr((name, ledger.column(name).to_pylist())).encode())
    return hasher.hexdigest()
