"""The cache's format: Arrow IPC files to be memory-mapped, with what they were made with in the schema's metadata.

A row holds a selected sample: its posterior's mean and log-variance, not sampled and not scaled, and the token states
of its caption, not dropped; what varies from epoch to epoch is the trainer's matter. Rows lie in the order of their
keys, in record batches of `ROWS_PER_BATCH` whatever they were encoded in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.dataset.errors import CacheDamaged, CacheMismatch

CACHE_FORMAT_VERSION = 2
METADATA_KEY = b"latentworks"
ROWS_PER_BATCH = 256
Half = NDArray[np.float16]


@dataclass(frozen=True)
class CacheSchema:
    """Shapes of a cache, and what it is bound to. Field names are the keys of the metadata."""

    moments_shape: tuple[int, int, int]
    """[2C, h, w]: mean, then log-variance."""
    text_shape: tuple[int, int]
    """[L, D]."""
    autoencoder_sha256: str
    """Hash of the autoencoder's file of weights."""
    text_encoder: str
    """Identity: name and hash of the weights."""
    text_form: str
    """ "padded": the states of all L positions."""
    transform: str
    """What was done to an image before it was encoded, such as "center_square 64"."""
    dtype: str = "float16"
    format_version: int = CACHE_FORMAT_VERSION

    def binding(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        values = asdict(self)
        return values | {"moments_shape": list(self.moments_shape), "text_shape": list(self.text_shape)}

    @property
    def sample_schema(self) -> Any:
        return pa.schema(
            [
                ("uid", pa.string()),
                ("key", pa.string()),
                ("split", pa.string()),
                ("caption", pa.string()),
                ("moments", pa.list_(pa.float16(), int(np.prod(self.moments_shape)))),
                ("text", pa.list_(pa.float16(), int(np.prod(self.text_shape)))),
                ("original_width", pa.int32()),
                ("original_height", pa.int32()),
                ("caption_tokens", pa.int32()),
            ],
            metadata=self._metadata(),
        )

    @property
    def null_schema(self) -> Any:
        """Schema of the file with the empty prompt's states: column `text`, one row."""
        return pa.schema([("text", pa.list_(pa.float16(), int(np.prod(self.text_shape))))], metadata=self._metadata())

    @classmethod
    def from_arrow(cls, schema: Any, where: str) -> CacheSchema:
        """Raises `CacheDamaged` if the metadata is absent or lacks something; `where` names the file."""
        try:
            values = json.loads((schema.metadata or {})[METADATA_KEY])
            shapes = {name: tuple(values[name]) for name in ("moments_shape", "text_shape")}
            return cls(**{field.name: values[field.name] for field in fields(cls)} | shapes)
        except (KeyError, ValueError, TypeError) as error:
            raise CacheDamaged(
                f"{where} does not say what it was made with ({error!r} in its metadata); make the cache again with"
                " `--force encode.<model>`"
            ) from error

    def check(self, expected: Mapping[str, Any], where: str) -> None:
        """Raises `CacheMismatch` unless the binding has the values of `expected` (some of its keys)."""
        found = self.binding()
        for name, value in expected.items():
            if found.get(name) != value:
                raise CacheMismatch(
                    f"{where} was made with {name} {found.get(name)!r}, but is to be used with {value!r}; make the"
                    " cache again with `--force encode.<model>`, or use it with what it was made with"
                )

    def _metadata(self) -> dict[bytes, bytes]:
        return {METADATA_KEY: json.dumps(self.binding(), sort_keys=True).encode()}


@dataclass(frozen=True)
class CacheRows:
    """Some samples: `moments` [B, 2C, h, w], `text` [B, L, D], both float16; the other fields have length B, or none
    where a field isn't known."""

    uid: Sequence[str]
    key: Sequence[str]
    split: Sequence[str]
    caption: Sequence[str]
    moments: Half
    text: Half
    original_width: Sequence[int]
    original_height: Sequence[int]
    caption_tokens: Sequence[int] = ()
    """Number of tokens of each caption in full; `text` holds the first L."""


class CacheWriter:
    """Takes rows in the order of their keys and writes them in record batches of one size."""

    def __init__(self, schema: CacheSchema, writer: Any) -> None:
        self._schema = schema.sample_schema
        self._writer = writer
        self._pending: dict[str, list[Any]] = {name: [] for name in self._schema.names}

    def append(self, rows: CacheRows) -> None:
        for name, values in self._pending.items():
            own = getattr(rows, name)
            values.extend(own if len(own) else [None] * len(rows.uid))
        while len(self._pending["uid"]) >= ROWS_PER_BATCH:
            self._write(ROWS_PER_BATCH)

    def close(self) -> None:
        if self._pending["uid"]:
            self._write(ROWS_PER_BATCH)

    def _write(self, num_rows: int) -> None:
        """Each batch is built anew from plain values: a slice of a larger one would be the same rows in other bytes."""
        columns = [_column(field.type, self._pending[field.name][:num_rows]) for field in self._schema]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        for values in self._pending.values():
            del values[:num_rows]


def _column(column_type: Any, values: Sequence[Any]) -> Any:
    if not pa.types.is_fixed_size_list(column_type):
        return pa.array(values, column_type)
    flat = pa.array(np.stack(values).reshape(-1), column_type.value_type)
    return pa.FixedSizeListArray.from_arrays(flat, type=column_type)


@contextmanager
def write_cache(path: Path, schema: CacheSchema) -> Iterator[CacheWriter]:
    """A writer for the block; the file is complete when the block has ended well."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema.sample_schema) as arrow_writer:
        writer = CacheWriter(schema, arrow_writer)
        yield writer
        writer.close()


def null_file(schema: CacheSchema, text: Half) -> bytes:
    """The file of the empty prompt's states; `text` is [L, D]."""
    arrow_schema = schema.null_schema
    column = _column(arrow_schema.field("text").type, [text])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, arrow_schema) as writer:
        writer.write_batch(pa.record_batch([column], schema=arrow_schema))
    return bytes(sink.getvalue())


class CacheFile:
    """A memory-mapped file of the cache. Arrays are views: nothing is read before it is looked at."""

    def __init__(self, path: Path) -> None:
        """Raises `CacheDamaged` if the file is cut off or no cache; `FileNotFoundError`."""
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            self.table = reader.read_all()
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise CacheDamaged(
                f"{path} is damaged ({error}); make the cache again with `--force encode.<model>`"
            ) from error
        self.schema = CacheSchema.from_arrow(reader.schema, str(path))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def moments(self) -> list[Half]:
        """A view [rows, 2C, h, w] for each record batch."""
        return self._views("moments", self.schema.moments_shape)

    def text(self) -> list[Half]:
        """A view [rows, L, D] for each record batch."""
        return self._views("text", self.schema.text_shape)

    def strings(self, column: str) -> list[str]:
        """`uid`, `key`, `split` or `caption` of each row."""
        values: list[str] = self.table.column(column).to_pylist()
        return values

    def _views(self, column: str, shape: Sequence[int]) -> list[Half]:
        chunks = self.table.column(column).chunks
        return [chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, *shape) for chunk in chunks]


def open_cache(path: Path, expected: Mapping[str, Any] | None = None) -> CacheFile:
    """A file of the cache, refused if it isn't bound to what `expected` says (some keys of `CacheSchema.binding`).

    Raises:
        CacheMismatch: it was made with something else; the message says which.
        CacheDamaged: it is not what `encode` wrote.
    """
    file = CacheFile(path)
    file.schema.check(expected or {}, str(path))
    return file
