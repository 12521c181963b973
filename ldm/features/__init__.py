"""Image features of frozen networks: what distances between sets of images are measured with (`ldm.metrics`).

A figure is only comparable with others of the same extractor, which is why each carries the extractor's name; the name
holds the network and the size that images are resized to. Nothing is downloaded: weights come in a Python package or by
path. Libraries are imported where a network is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ldm.errors import ConfigError
from ldm.features.clip import load_clip_images
from ldm.features.dinov2 import Dinov2
from ldm.features.efficientnet import EfficientNetLite0
from ldm.features.extractor import AT_ONCE, ExtractorMissing, FeatureExtractor
from ldm.features.inception import Inception

__all__ = [
    "AT_ONCE",
    "EXTRACTORS",
    "EXTRACTORS_BY_PATH",
    "EfficientNetLite0",
    "ExtractorMissing",
    "FeatureExtractor",
    "load_extractor",
]

EXTRACTORS: dict[str, Callable[[torch.device], FeatureExtractor]] = {"efficientnet_lite0": EfficientNetLite0}
"""With weights in a package."""

EXTRACTORS_BY_PATH: dict[str, Callable[[Path, torch.device], FeatureExtractor]] = {
    "inception": Inception,
    "clip": load_clip_images,
    "dinov2": Dinov2,
}
"""With weights by path: "inception:FILE.pth", "clip:FOLDER", "dinov2:FOLDER"."""


def load_extractor(name: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor that recipes call `name`: one of `EXTRACTORS`, or KIND:PATH of `EXTRACTORS_BY_PATH`.

    Raises `ConfigError` for another name, `ExtractorMissing` if its package is not installed, `FolderError` if its
    weights can't be read.
    """
    kind, colon, path = name.partition(":")
    if not colon and kind in EXTRACTORS:
        return EXTRACTORS[kind](torch.device(device))
    if path and kind in EXTRACTORS_BY_PATH:
        return EXTRACTORS_BY_PATH[kind](Path(path), torch.device(device))
    known = (*EXTRACTORS, *(f"{kind}:PATH" for kind in EXTRACTORS_BY_PATH))
    raise ConfigError(f"extractor {name!r}: must be one of {', '.join(known)}")
