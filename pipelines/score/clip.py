"""How well a caption fits its image, as a CLIP has it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ldm.clip import load_clip
from pipelines.dataset.scores import Identity
from pipelines.score.scorer import Pixels, by_shape


class ClipSimilarity:
    """Column `clip_similarity`: the cosine of image and caption."""

    fields = (pa.field("clip_similarity", pa.float32(), nullable=False),)

    def __init__(self, source: str | Path, device: str) -> None:
        """`source` is what `load_clip` takes. Raises `ldm.errors.FolderError`."""
        self._clip = load_clip(source, device)
        model, _, sha256 = self._clip.identity.rpartition(" sha256:")
        self.identity: Identity = {
            "model": model,
            "version": f"open_clip {metadata.version('open_clip_torch')}",
            "sha256": sha256,
        }

    def __call__(self, images: Sequence[Pixels], captions: Sequence[str]) -> Mapping[str, Any]:
        embedded = torch.from_numpy(by_shape(images, self._clip.images))
        cosines = (embedded * self._clip.texts(captions)).sum(dim=1)
        return {"clip_similarity": cosines.numpy().astype(np.float32)}
