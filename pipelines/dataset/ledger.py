"""The ledger: what became of every URL or file, with a reason from an enumeration, and how the rows are counted.

Columns that img2dataset knows have its names and meanings; ours stand beside them.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from enum import StrEnum
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa

from pipelines.artifacts import Counts

UID_NORMALISER = "1"
DEFAULT_PORTS = {"http": 80, "https": 443}


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
    }
)

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
    pa.field("opt_out", pa.struct([("signal", pa.string()), ("evidence", pa.string())])),
    pa.field("mime", pa.string()),
    pa.field("stored_sha256", pa.string()),
    pa.field("phash", pa.uint64()),
    pa.field("orientation", pa.int8()),
    pa.field("final_url", pa.string()),
    pa.field("fetched_at", pa.timestamp("ms", tz="UTC")),
    pa.field("attempts", pa.int16()),
    pa.field("shard", pa.int32(), nullable=False),
)
RESERVED_NAMES = frozenset(field.name for field in (*SOURCE_COLUMNS, *IMG2DATASET_COLUMNS, *OUR_COLUMNS))
VOLATILE_COLUMNS = ("fetched_at", "attempts", "final_url")
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


def make_uid(url: str, caption: str) -> str:
    """32 hexadecimal digits: the first 16 bytes of sha256 over the normaliser's version, url and caption.

    Each part is preceded by its length in bytes (8, big-endian), so that no two pairs run together.
    """
    hasher = hashlib.sha256()
    for part in (UID_NORMALISER, normalised_url(url), normalised_caption(caption)):
        encoded = part.encode("utf-8", "surrogatepass")
        hasher.update(len(encoded).to_bytes(8, "big"))
        hasher.update(encoded)
    return hasher.digest()[:16].hex()


def normalised_url(url: str) -> str:
    """Scheme and host in lower case, no default port, no fragment, no empty path; as it is if it can't be parsed."""
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError:
        return url.strip()
    host = (parts.hostname or "").lower()
    host = f"[{host}]" if ":" in host else host
    userinfo = parts.netloc.rpartition("@")[0]
    netloc = f"{userinfo}@{host}" if userinfo else host
    if port is not None and port != DEFAULT_PORTS.get(parts.scheme.lower()):
        netloc += f":{port}"
    return urlunsplit((parts.scheme.lower(), netloc, parts.path or "/", parts.query, ""))


def normalised_caption(caption: str) -> str:
    """Unicode NFC, runs of white space as one blank, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", caption).split())
