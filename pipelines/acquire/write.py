"""Write a shard: `<shard>.tar` for webdataset, and `<shard>.parquet`, the ledger: a row for every URL, in input order.

`ShardWriter` takes the place of img2dataset's sample writers. Samples come in the order in which they arrive from the
web, and are written in the list's order: the same samples give the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.acquire.errors import ShardFailed
from pipelines.dataset.ledger import VOLATILE_COLUMNS

PARQUET_COMPRESSION = "zstd"


@dataclass(frozen=True)
class _Place:
    """Where a sample's image lies in the scratch file."""

    offset: int
    size_bytes: int


class ShardWriter:
    """Collects a shard's rows and images, out of order, and writes both files when it is closed.

    Images wait in a scratch file, so that memory holds rows alone.
    """

    def __init__(self, folder: Path, shard_name: str, schema: Any, suffix: str, num_rows: int) -> None:
        self._folder = folder
        self._name = shard_name
        self._schema = schema
        self._suffix = suffix
        self._rows: list[dict[str, Any] | None] = [None] * num_rows
        self._places: dict[int, _Place] = {}
        self._scratch: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._end = 0

    @property
    def tar_path(self) -> Path:
        return self._folder / f"{self._name}.tar"

    @property
    def ledger_path(self) -> Path:
        return self._folder / f"{self._name}.parquet"

    def add(self, index: int, row: Mapping[str, Any], image: bytes | None) -> None:
        """`index` is the row's place in the input; `image` is there if the row is kept."""
        if image is not None:
            row = {**row, "stored_sha256": hashlib.sha256(image).hexdigest()}
            self._scratch.write(image)
            self._places[index] = _Place(self._end, len(image))
            self._end += len(image)
        self._rows[index] = dict(row)

    def discard(self) -> None:
        """Give up; nothing is written."""
        self._scratch.close()

    def close(self) -> None:
        """Write tar and ledger.

        Raises:
            ShardFailed: rows are missing.
            OSError: the disk is full or can't be written.
        """
        with self._scratch:
            rows = [row for row in self._rows if row is not None]
            if len(rows) < len(self._rows):
                missing = [index for index, row in enumerate(self._rows) if row is None]
                raise ShardFailed(f"shard {self._name}: {len(missing)} rows were lost, the first is {missing[0]}")
            with tarfile.open(self.tar_path, "w", format=tarfile.USTAR_FORMAT) as tar:
                for index in sorted(self._places):
                    self._write_sample(tar, rows[index], self._places[index])
        ledger = pa.Table.from_pylist(rows, schema=self._schema)
        pq.write_table(ledger, self.ledger_path, compression=PARQUET_COMPRESSION)

    def _write_sample(self, tar: tarfile.TarFile, row: Mapping[str, Any], place: _Place) -> None:
        self._scratch.seek(place.offset)
        members = {
            self._suffix: self._scratch.read(place.size_bytes),
            "json": sample_json(row, self._schema.names),
            "txt": (row["caption"] or "").encode("utf-8", "replace"),
        }
        for suffix, content in sorted(members.items()):
            # A new TarInfo has time 0, user and group 0, no names of them, and mode 0644.
            entry = tarfile.TarInfo(f"{row['key']}.{suffix}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def sample_json(row: Mapping[str, Any], columns: Sequence[str]) -> bytes:
    """The ledger's row as it stands in the tar: without what varies from run to run, keys sorted."""
    stable = {name: row.get(name) for name in columns if name not in VOLATILE_COLUMNS}
    return (json.dumps(stable, sort_keys=True, ensure_ascii=False, indent=1, default=str) + "\n").encode(
        "utf-8", "replace"
    )
