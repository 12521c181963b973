"""Images of the acquired shards, by number, as uint8 tensors: read at their offset in the tar, decoded when asked for.

A shard's headers are read once, when one of its images is first needed; nothing is unpacked. Which images there are
is the selection's matter.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from infra.storage import Store
from pipelines.artifacts import Artifact, Unit
from pipelines.encode.shard import IMAGE_SUFFIXES, decoded
from pipelines.train.errors import UnusableData
from pipelines.train.randomness import sample_id

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class ImageRow:
    """Where an image lies: its sample's uid, its shard, and its key there."""

    uid: str
    shard: int
    key: str


class ShardImages:
    """Images of acquired shards, in the order of `rows`, as squares of `size_px`.

    By default `size_px` is the shorter side of the first image, which is that of all of them wherever `acquire` made
    them of one size.

    Decoded images are kept until `cache_bytes` of them are, then no more: in an order that is shuffled anew each
    epoch, whatever stays is as good as what would replace it.
    """

    def __init__(
        self,
        store: Store,
        acquire: Artifact,
        rows: Sequence[ImageRow],
        *,
        size_px: int | None = None,
        cache_bytes: int = 256_000_000,
    ) -> None:
        """Raises `UnusableData` if `size_px` is not given and there is no image to take it from."""
        self._rows = list(rows)
        self._shards: Mapping[int, Unit] = {int(unit.info["shard"]): unit for unit in acquire.units}
        self._store = store
        self._free_bytes = cache_bytes
        self._decoded: dict[int, Pixels] = {}
        self._indices: dict[int, _TarIndex] = {}
        if size_px is None:
            if not self._rows:
                raise UnusableData("there are no images to train on; select more")
            size_px = min(self._stored(0).shape[:2])
        self.size_px = size_px

    def __len__(self) -> int:
        return len(self._rows)

    def sample_ids(self, rows: Sequence[int]) -> list[int]:
        return [sample_id(self._rows[row].uid) for row in rows]

    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        """uint8 [B, size, size, 3], RGB.

        Raises:
            UnusableData: a listed image is missing.
            pipelines.encode.errors.UnusableImage: one can't be decoded.
        """
        return torch.from_numpy(np.stack([self._image(row) for row in rows]))

    def _image(self, number: int) -> Pixels:
        if number in self._decoded:
            return self._decoded[number]
        pixels = square(self._stored(number), self.size_px)
        if pixels.nbytes <= self._free_bytes:
            self._free_bytes -= pixels.nbytes
            self._decoded[number] = pixels
        return pixels

    def _stored(self, number: int) -> Pixels:
        row = self._rows[number]
        if row.shard not in self._indices:
            if row.shard not in self._shards:
                raise UnusableData(f"the selection lists shard {row.shard}, which `acquire` did not publish")
            self._indices[row.shard] = _TarIndex(self._store.fetch(self._shards[row.shard].only(".tar")))
        return self._indices[row.shard].image(row.key)


class SelectedImages(ShardImages):
    """The images of one split of a selection, in the selection's order (shard, key)."""

    def __init__(
        self,
        store: Store,
        acquire: Artifact,
        select: Artifact,
        *,
        split: str,
        size_px: int | None = None,
        cache_bytes: int = 256_000_000,
    ) -> None:
        """Raises `UnusableData` if `size_px` is not given and the split has no image to take it from."""
        (unit,) = select.units
        selection = io.BytesIO(store.read_bytes(unit.path("selection.parquet")))
        table = pq.read_table(selection, columns=["uid", "shard", "key"], filters=[("split", "=", split)])
        rows = [ImageRow(**row) for row in table.to_pylist()]
        if not rows and size_px is None:
            raise UnusableData(f"the selection has no {split} images; select more")
        super().__init__(store, acquire, rows, size_px=size_px, cache_bytes=cache_bytes)


class _TarIndex:
    """Where the images of one tar lie in it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                key, suffix = os.path.splitext(member.name)  # noqa: PTH122 - a name in a tar, not a path
                if suffix.lower() in IMAGE_SUFFIXES:
                    self._places[key] = (member.offset_data, member.size)

    def image(self, key: str) -> Pixels:
        """RGB [h, w, 3]."""
        if key not in self._places:
            raise UnusableData(f"{self._path} has no image {key!r}, which the selection lists; acquire it again")
        offset, size_bytes = self._places[key]
        with self._path.open("rb") as file:
            encoded = os.pread(file.fileno(), size_bytes, offset)
        return decoded(encoded, f"image {key!r} of {self._path}")


def square(pixels: Pixels, size_px: int) -> Pixels:
    """The middle square of an RGB image [h, w, 3], resized to `size_px`; untouched if it has that size."""
    import cv2

    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cropped = pixels[top : top + side, left : left + side]
    if side == size_px:
        return np.ascontiguousarray(cropped)
    interpolation = cv2.INTER_AREA if side > size_px else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(cropped, (size_px, size_px), interpolation=interpolation), np.uint8)
