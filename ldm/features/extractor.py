"""What every extractor is, and what they share."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ldm.errors import FolderError, InputError, LdmError

AT_ONCE = 16
"""Images in one pass. On a CPU, more are slower: activations no longer fit its caches."""


class ExtractorMissing(LdmError):
    """A feature extractor's package is not installed, or damaged."""


class FeatureExtractor(Protocol):
    """A frozen network that says what is in an image."""

    @property
    def name(self) -> str:
        """Network and input size, as figures carry it: "efficientnet_lite0_128px". Where the weights are the user's,
        the first 8 digits of their hash too."""

    @property
    def width(self) -> int:
        """Length of an image's features."""

    @property
    def sha256(self) -> str:
        """Hash of the file of weights, or as the extractor says."""

    def __call__(self, images_BHWC: Tensor) -> Tensor:
        """Features float32 [B, width] on the CPU, of uint8 RGB images [B, H, W, 3]; each image's are its own, whatever
        it is batched with."""


def in_passes(images_BHWC: Tensor, width: int, features: Callable[[Tensor], Tensor]) -> Tensor:
    """Float32 [B, width] on the CPU: `features` of `AT_ONCE` images at a time, which it is given as [b, 3, H, W].

    Raises `InputError` for another type or shape of images.
    """
    if images_BHWC.dtype != torch.uint8 or images_BHWC.ndim != 4 or images_BHWC.shape[-1] != 3:
        raise InputError(
            f"images are {images_BHWC.dtype} {tuple(images_BHWC.shape)}: must be uint8 [batch, height, width, 3]"
        )
    if not len(images_BHWC):
        return torch.zeros(0, width)
    return torch.cat([features(part.permute(0, 3, 1, 2)) for part in torch.split(images_BHWC, AT_ONCE)]).float().cpu()


def squashed(pixels_BCHW: Tensor, size_px: int) -> Tensor:
    """Images resized to a square, bicubic and antialiased, float32 in [0, 255]."""
    size = (size_px, size_px)
    pixels = interpolate(pixels_BCHW.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return pixels.clamp(0, 255)


def package(module: str, distribution: str, source: str = "") -> Any:
    """The module; `source` is what to install, where it isn't the distribution itself. Raises `ExtractorMissing`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ExtractorMissing(
            f"image features need the package {distribution}, which can't be imported ({error}):"
            f' pip install "{source or distribution}", or leave the extractor out of the recipe'
        ) from error


def safetensors_hash(folder: Path) -> str:
    """Hex sha256 of a folder's files of weights one after another, by name. Raises `FolderError` if there is none:
    pickled weights are not read."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FolderError(f"{folder} has no *.safetensors: save the model with save_pretrained(FOLDER)")
    digest = hashlib.sha256()
    for path in files:
        _read_into(digest, path)
    return digest.hexdigest()


def content_sha256(path: Path) -> str:
    """Hex sha256 of a file, or of the names and hashes of all files in a folder, but for hidden ones.

    Raises `FolderError` if there are none, or one can't be read.
    """
    try:
        if not path.is_dir():
            return _file_sha256(path)
        names = sorted(each.relative_to(path).as_posix() for each in path.rglob("*") if each.is_file())
        names = [name for name in names if not any(part.startswith(".") for part in name.split("/"))]
        lines = [f"{_file_sha256(path / name)}  {name}" for name in names]
    except OSError as error:
        raise FolderError(f"an extractor's weights can't be read: {error}") from error
    if not lines:
        raise FolderError(f"{path} has no files: give the folder that holds the extractor's weights")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    _read_into(digest, path)
    return digest.hexdigest()


def _read_into(digest: Any, path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
