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
from ldm.features.extractor import AT_ONCE, ExtractorMissing, FeatureExtractor, content_sha256
from ldm.features.inception import Inception

__all__ = [
    "AT_ONCE",
    "EXTRACTORS",
    "EXTRACTORS_BY_PATH",
    "EfficientNetLite0",
    "ExtractorMissing",
    "FeatureExtractor",
    "extractor_names",
    "extractor_sha256",
    "load_extractor",
    "parse_extractor",
    "register_extractor",
]

EXTRACTORS: dict[str, Callable[[torch.device], FeatureExtractor]] = {}
"""Extractors with weights in a package, by name. `register_extractor` adds to them."""

EXTRACTORS_BY_PATH: dict[str, Callable[[Path, torch.device], FeatureExtractor]] = {}
"""Extractors with weights by path, by kind: "inception:FILE.pth", "clip:FOLDER", "dinov2:FOLDER"."""


def register_extractor(name: str, load: Callable[..., FeatureExtractor], *, by_path: bool = False) -> None:
    """Make an extractor known: `load(device)` under its name, or `load(path, device)` as "NAME:PATH".

    Every process that reads the name has to register it: do it where your package is imported. Raises `ConfigError` for
    a name that is there already, in either form, or that has a colon or spaces, or none at all.
    """
    if not name or ":" in name or name.split() != [name]:
        raise ConfigError(f"extractor {name!r}: must be a name without colon and spaces")
    if name in EXTRACTORS or name in EXTRACTORS_BY_PATH:
        raise ConfigError(f"extractor {name!r} is registered already: choose another name")
    if by_path:
        EXTRACTORS_BY_PATH[name] = load
    else:
        EXTRACTORS[name] = load


register_extractor("efficientnet_lite0", EfficientNetLite0)
register_extractor("inception", Inception, by_path=True)
register_extractor("clip", load_clip_images, by_path=True)
register_extractor("dinov2", Dinov2, by_path=True)


def extractor_names() -> tuple[str, ...]:
    """What may be written for an extractor: "efficientnet_lite0", "inception:PATH" and so on."""
    return (*EXTRACTORS, *(f"{kind}:PATH" for kind in EXTRACTORS_BY_PATH))


def parse_extractor(name: str) -> tuple[str, Path | None]:
    """The kind and, if it is of `EXTRACTORS_BY_PATH`, the path that recipes mean by `name`, by its form alone: nothing
    is imported or read. Raises `ConfigError` for a name that isn't one of `extractor_names`."""
    kind, colon, path = name.partition(":")
    if not colon and kind in EXTRACTORS:
        return kind, None
    if path and kind in EXTRACTORS_BY_PATH:
        return kind, Path(path)
    raise ConfigError(f"extractor {name!r}: must be one of {', '.join(extractor_names())}")


def load_extractor(name: str, device: torch.device | str = "cpu") -> FeatureExtractor:
    """The extractor that recipes call `name`: see `extractor_names`.

    Raises `ConfigError` for another name, `ExtractorMissing` if its package is not installed, `FolderError` if its
    weights can't be read.
    """
    kind, path = parse_extractor(name)
    if path is None:
        return EXTRACTORS[kind](torch.device(device))
    return EXTRACTORS_BY_PATH[kind](path, torch.device(device))


def extractor_sha256(name: str) -> str:
    """Hex sha256 of what decides over the features of `name`, for keys: the file, or all files of the folder, its
    configuration among them; in a package, the extractor's own. No network is built for a path.

    Raises `ConfigError` for another name, `FolderError` if there is no such file, `ExtractorMissing` without a package.
    """
    path = parse_extractor(name)[1]
    return load_extractor(name).sha256 if path is None else content_sha256(path)
