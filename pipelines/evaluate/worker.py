"""A process that makes pictures and measures them: features and judgements leave it, pictures mostly don't.

Runs as a Ray actor; knows nothing of Ray.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.features import FeatureExtractor, load_extractor
from pipelines.artifacts import Artifact, Unit, fetch_folder
from pipelines.dataset.acquired import Shards
from pipelines.dataset.images import SelectedImages
from pipelines.dataset.selection import SIDES, Side
from pipelines.evaluate.generate import GenerateJob, Generator, Network, Shot
from pipelines.recipe.plugins import load_plugins
from pipelines.recipe.registered import check_weights, hashes_of

Kind = Literal["pictures", "features", "judged", "texts"]
"""What may be told: of an image itself (uint8 [H, W, 3]), its features ([W]) and what the judge sees in it ([D]), of a
text what the judge reads in it ([D]); float32 all but the first."""
Arrays = Mapping[str, NDArray[Any]]


class Judge(Protocol):
    """A CLIP: images and texts in one space. Embeddings are float32 [B, D] of length 1, on the CPU."""

    @property
    def identity(self) -> str:
        """Architecture and weights."""

    def images(self, images_BHWC: Tensor) -> Tensor:
        """Embeddings of uint8 images."""

    def texts(self, texts: list[str]) -> Tensor: ...


@dataclass(frozen=True)
class Figures:
    """What pictures are measured with. `judge` is a unit with a folder `clip`, or what `load_clip` takes;
    `extractor_key` is what the extractor is in keys: its name, or a block with hashes."""

    acquire: Shards
    select: Artifact
    extractor: str
    judge: Unit | str | None
    extractor_key: Any = None


@dataclass(frozen=True)
class MeasureJob(GenerateJob):
    """What pictures are made with and, unless there are to be pictures alone, measured."""

    figures: Figures | None = None


@dataclass(frozen=True)
class PicturesTask:
    """Pictures to make, of which `kinds` are wanted."""

    number: int
    kinds: Sequence[Kind]
    network: Network
    shots: Sequence[Shot]


@dataclass(frozen=True)
class ImagesTask:
    """Real images to look at: `rows` of a split, of which `kinds` are wanted."""

    number: int
    kinds: Sequence[Kind]
    split: Side
    rows: Sequence[int]


@dataclass(frozen=True)
class TextsTask:
    """Texts that the judge is to read."""

    number: int
    kinds: Sequence[Kind]
    texts: Sequence[str]


Task = PicturesTask | ImagesTask | TextsTask


class Measurer:
    """Makes what it is asked for and looks at it, task after task; nothing is loaded before it is needed."""

    def __init__(self, job: MeasureJob, device: str, threads: int) -> None:
        self._job = job
        self._device = torch.device(device)
        self._generator = Generator(job, self._device)
        torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))

    def identities(self) -> dict[str, str]:
        """Who reads the prompts (`text_encoder`) and who measures: `extractor`, `extractor_sha256` and, if there is
        one, `judge`."""
        found = {"text_encoder": self._generator.reads_with}
        if self._job.figures is not None:
            found |= {"extractor": self._extractor.name, "extractor_sha256": self._extractor.sha256}
            found |= {} if self._judge is None else {"judge": self._judge.identity}
        return found

    def measure(self, task: Task) -> tuple[int, Arrays]:
        """The task's number, and by kind a row for each shot, image or text.

        Raises:
            ldm.errors.LdmError: a network can't be loaded or makes NaN, or its package is missing.
            pipelines.dataset.errors.UnusableImage: a real image can't be decoded.
        """
        if isinstance(task, TextsTask):
            assert self._judge is not None, "texts are for a judge"
            return task.number, {"texts": self._judge.texts(list(task.texts)).numpy()}
        if isinstance(task, PicturesTask):
            images = self._pictures(task.network, task.shots)
        else:
            images = self._real[task.split].rows(task.rows)
        return task.number, {kind: self._told(kind, images).numpy() for kind in task.kinds}

    def _pictures(self, network: Network, shots: Sequence[Shot]) -> Tensor:
        """Uint8 [B, H, W, 3]."""
        return self._generator.pictures(network, shots)

    def _told(self, kind: Kind, images_BHWC: Tensor) -> Tensor:
        if kind == "pictures":
            return images_BHWC
        if kind == "features":
            return self._extractor(images_BHWC)
        assert self._judge is not None, "what nobody judges is not asked for"
        return self._judge.images(images_BHWC)

    @property
    def _figures(self) -> Figures:
        assert self._job.figures is not None, "there is nothing to measure with"
        return self._job.figures

    @cached_property
    def _extractor(self) -> FeatureExtractor:
        figures = self._figures
        load_plugins(self._job.plugins)
        check_weights(figures.extractor, hashes_of(figures.extractor_key).get("sha256"))
        return load_extractor(figures.extractor, self._device)

    @cached_property
    def _judge(self) -> Judge | None:
        judge = self._figures.judge
        if judge is None:
            return None
        from ldm.clip import load_clip

        return load_clip(
            judge if isinstance(judge, str) else fetch_folder(self._job.store, judge, "clip"), self._device
        )

    @cached_property
    def _real(self) -> Mapping[Side, SelectedImages]:
        job, figures = self._job, self._figures
        size_px = int(job.store.read_json(job.autoencoder.path("vae/config.json"))["sample_size"])
        return {
            split: SelectedImages(
                job.store, figures.acquire, figures.select, split=split, size_px=size_px, cache_bytes=0
            )
            for split in SIDES
        }
