"""What a pair is known by: its uid, given by the list or made of url and caption, and the sample's key made of it."""

from __future__ import annotations

import hashlib
import unicodedata
from urllib.parse import urlsplit, urlunsplit

UID_NORMALISER = "1"
DEFAULT_PORTS = {"http": 80, "https": 443}
KEY_DIGITS = 20


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


def sample_key(uid: str) -> str:
    """20 hexadecimal digits of sha256 over the uid, any string: the sample's name in a tar, whatever shard it is in."""
    return hashlib.sha256(uid.encode("utf-8", "surrogatepass")).hexdigest()[:KEY_DIGITS]


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
