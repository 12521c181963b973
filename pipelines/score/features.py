"""Image features, which distances between sets of images are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ldm.features import FeatureExtractor, load_extractor
from pipelines.dataset.scores import Identity
from pipelines.recipe.plugins import plugin_of
from pipelines.recipe.registered import check_weights
from pipelines.score.scorer import Pixels, by_shape


class ImageFeatures:
    """No column: `features`, float16 [B, width], which lie in a file of their own."""

    fields = ()
    reads_captions = False

    def __init__(self, name: str, device: str, sha256: str | None = None) -> None:
        """`name` is what `load_extractor` takes; `sha256` the hash of its weights as it is in keys, if they are given
        by path."""
        self._name = name
        self._device = device
        self._sha256 = sha256

    @cached_property
    def identity(self) -> Identity:
        """Raises `ldm.errors.LdmError` if the extractor can't be loaded."""
        plugin = plugin_of("extractor", self._name.partition(":")[0])
        version = "1" if plugin is None else f"plugin {plugin.sha256}"
        sha256 = self._sha256 or self._extractor.sha256
        return {"model": self._extractor.name, "version": version, "sha256": sha256}

    @cached_property
    def _extractor(self) -> FeatureExtractor:
        check_weights(self._name, self._sha256)
        return load_extractor(self._name, self._device)

    def __call__(self, images: Sequence[Pixels], _captions: Sequence[str]) -> Mapping[str, Any]:
        with np.errstate(over="ignore"):  # who calls looks for what float16 can't hold
            return {"features": by_shape(images, self._extractor).astype(np.float16)}
