"""How well a caption fits its image, as a CLIP has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ldm.clip import Clip
from pipelines.dataset.scores import Identity
from pipelines.score.scorer import Pixels, by_shape


class ClipSimilarity:
    """Column `clip_similarity`: the cosine of image and caption."""

    fields = (pa.field("clip_similarity", pa.float32(), nullable=False),)
    reads_captions = True

    def __init__(self, load: Callable[[], Clip]) -> None:
        """`load` may raise `ldm.errors.FolderError`: whatever needs the model raises it then."""
        self._load = load

    @cached_property
    def identity(self) -> Identity:
        model, _, sha256 = self._clip.identity.rpartition(" sha256:")
        return {"model": model, "version": f"open_clip {metadata.version('open_clip_torch')}", "sha256": sha256}

    @cached_property
    def _clip(self) -> Clip:
        return self._load()

    def __call__(self, images: Sequence[Pixels], captions: Sequence[str]) -> Mapping[str, Any]:
        embedded = torch.from_numpy(by_shape(images, self._clip.images))
        cosines = (embedded * self._clip.texts(captions)).sum(dim=1)
        return {"clip_similarity": cosines.numpy().astype(np.float32)}
