"""Images of a shard, out of its tar: read at their place, decoded one by one; nothing is unpacked."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infra.storage import Store
from pipelines.artifacts import Unit, fetch_file
from pipelines.dataset.errors import UnusableData, UnusableImage

Pixels = NDArray[np.uint8]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})


def images_of(unit: Unit, keys: Sequence[str], store: Store) -> Iterator[NDArray[np.uint8]]:
    """RGB [h, w, 3] of each of the keys, read from the tar one after another; without keys the tar isn't opened.

    Raises `UnusableImage` if one is not in the tar or can't be decoded, `FileDamaged` if the tar is not what was
    recorded.
    """
    if not keys:
        return
    path = fetch_file(store, unit, ".tar")
    with tarfile.open(path, "r:") as tar:
        members = {
            PurePosixPath(member.name).stem: member
            for member in tar
            if PurePosixPath(member.name).suffix.lower() in IMAGE_SUFFIXES
        }
        for key in keys:
            file = tar.extractfile(members[key]) if key in members else None
            if file is None:
                raise UnusableImage(f"{path} has no image {key!r}, which is listed; acquire it again")
            yield decoded(file.read(), f"image {key!r} of {path}")


def decoded(encoded: bytes, where: str) -> NDArray[np.uint8]:
    """RGB [h, w, 3]. Raises `UnusableImage`; `where` names the image."""
    import cv2

    pixels: Any = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB) if encoded else None
    if pixels is None:
        raise UnusableImage(f"{where} can't be decoded; the file was damaged, acquire it again")
    return np.asarray(pixels, np.uint8)


class TarIndex:
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
