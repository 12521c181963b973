"""Images of the acquired shards, by number, as uint8 tensors: read at their offset in the tar, decoded when asked for.

A shard's headers are read once, when one of its images is first needed; nothing is unpacked. Which images there are
is the selection's matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from infra.storage import Store
from pipelines.artifacts import Artifact, Unit, fetch_file
from pipelines.dataset.acquired import Shards
from pipelines.dataset.errors import UnusableData
from pipelines.dataset.ledgers import by_shard
from pipelines.dataset.samples import sample_id
from pipelines.dataset.selection import Side, read_selection
from pipelines.dataset.shards import Pixels, TarIndex


@dataclass(frozen=True)
class ImageRow:
    """Where an image lies: its sample's uid, its shard, and its key there."""

    uid: str
    shard: str
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
        acquire: Shards,
        rows: Sequence[ImageRow],
        *,
        size_px: int | None = None,
        cache_bytes: int = 256_000_000,
    ) -> None:
        """Raises `UnusableData` if `size_px` is not given and there is no image to take it from."""
        self._rows = list(rows)
        self._shards: Mapping[str, Unit] = by_shard(acquire)
        self._store = store
        self._free_bytes = cache_bytes
        self._decoded: dict[int, Pixels] = {}
        self._indices: dict[str, TarIndex] = {}
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
            pipelines.dataset.errors.UnusableImage: one can't be decoded.
            infra.storage.FileDamaged: a shard is not what was recorded.
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
            self._indices[row.shard] = TarIndex(fetch_file(self._store, self._shards[row.shard], ".tar"))
        return self._indices[row.shard].image(row.key)


class SelectedImages(ShardImages):
    """The images of one split of a selection, in the selection's order (shard, key)."""

    def __init__(
        self,
        store: Store,
        acquire: Shards,
        select: Artifact,
        *,
        split: Side,
        size_px: int | None = None,
        cache_bytes: int = 256_000_000,
    ) -> None:
        """Raises `UnusableData` if `size_px` is not given and the split has no image to take it from."""
        table = read_selection(select, store, ["uid", "shard", "key"], split)
        rows = [ImageRow(**row) for row in table.to_pylist()]
        if not rows and size_px is None:
            raise UnusableData(f"the selection has no {split} images; select more")
        super().__init__(store, acquire, rows, size_px=size_px, cache_bytes=cache_bytes)


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
