"""The rows of a source as tables: their uids, and what they are known by."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import pyarrow as pa

from pipelines.dataset.uid import make_uid


def rows_digest(rows: Any) -> str:
    """Digest of a shard's rows and of the names and types of its columns."""
    hasher = hashlib.sha256(str(rows.schema.remove_metadata()).encode())
    for column in rows.columns:
        hasher.update(repr(column.to_pylist()).encode("utf-8", "surrogatepass"))
    return hasher.hexdigest()


def with_uids(table: Any) -> Any:
    """Columns url, caption, uid, then the others; a uid that is given is honoured."""
    pairs = zip(table["url"].to_pylist(), table["caption"].to_pylist(), strict=True)
    given = table["uid"].to_pylist() if "uid" in table.column_names else itertools.repeat(None)
    uids = [uid or make_uid(url or "", caption or "") for uid, (url, caption) in zip(given, pairs, strict=False)]
    others = {name: table[name] for name in table.column_names if name not in {"url", "caption", "uid"}}
    columns = {"url": table["url"], "caption": table["caption"], "uid": pa.array(uids, pa.string()), **others}
    return pa.table(columns)
