"""Sources to shards: rows brought to one schema, and each list cut into pieces of a fixed size.

What the rows are and where they come from is a matter of the source's kind (`pipelines.acquire.sources`). Tables are a
few thousand rows long, so that memory doesn't grow with a list. No shard has rows of two lists, so that a list that
comes or goes leaves the others' shards what they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipelines.acquire.sources import rows_of_source
from pipelines.acquire.tables import with_uids
from pipelines.recipe import Source


def source_identity(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the rows depend on, and the source's settings. Reads what it must to see that the source can be used.

    Raises:
        SourceError: a missing file or folder, an unknown format, a wrong column, an empty list or folder.
        GalleryError: its packages aren't installed.
    """
    return rows_of_source(source).identity()


def shards(source: Source, shard_size: int) -> Iterator[Any]:
    """Tables of `shard_size` rows, in the order of the source; the last of each list may be shorter.

    Raises `SourceError`.
    """
    for tables in rows_of_source(source).lists():
        waiting: list[Any] = []
        num_waiting = 0
        for table in map(with_uids, tables):
            waiting.append(table)
            num_waiting += table.num_rows
            while num_waiting >= shard_size:
                joined = pa.concat_tables(waiting)
                yield joined.slice(0, shard_size).combine_chunks()
                waiting = [joined.slice(shard_size)]
                num_waiting -= shard_size
        if num_waiting:
            yield pa.concat_tables(waiting).combine_chunks()
