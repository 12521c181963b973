"""A process that makes pictures and measures them: features and judgements leave it, pictures mostly don't.

Runs as a Ray actor; knows nothing of Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.features import FeatureExtractor, load_extractor
from ldm.generate import decode_latents
from ldm.sampling import sample_latents, seeded_noise
from ldm.unet import UNet2DCondition
from pipelines.artifacts import Artifact, Unit, fetch_folder
from pipelines.dataset.images import SelectedImages
from pipelines.evaluate.generate import GenerateJob, Generator, Shot
from pipelines.recipe.networks import initial_unet

Arrays = Mapping[str, NDArray[Any]]


class Judge(Protocol):
    """A CLIP: images and texts in one space. Embeddings are float32 [B, D] of length 1, on the CPU."""

    @property
    def identity(self) -> str:
        """Architecture and weights."""

    def images(self, images_BHWC: Tensor) -> Tensor:
        """Of uint8 images."""

    def texts(self, texts: list[str]) -> Tensor: ...


@dataclass(frozen=True)
class MeasureJob(GenerateJob):
    """With what pictures are made and measured. `judge` is a unit with a folder `clip`, or what `load_clip` takes."""

    acquire: Artifact
    select: Artifact
    extractor: str
    judge: Unit | str | None


@dataclass(frozen=True)
class PicturesTask:
    """Pictures to make and measure, by each of `networks`: "trained" or "initial"."""

    name: str
    shots: Sequence[Shot]
    networks: Sequence[str]
    shown: int = 0
    """So many of the first shots' pictures, by the trained network, are handed back as they are."""

    @property
    def num_images(self) -> int:
        return len(self.shots) * len(self.networks)


@dataclass(frozen=True)
class ImagesTask:
    """Real images to measure: `rows` of a split. `features` false: they are known already."""

    name: str
    split: str
    rows: Sequence[int]
    features: bool
    judged: bool

    @property
    def num_images(self) -> int:
        return len(self.rows)


class Measurer(Generator):
    """A `Generator` that can tell what it makes. Networks are loaded by the first call that needs them."""

    _job: MeasureJob

    def identities(self) -> dict[str, str]:
        """Who measures: `extractor`, `extractor_sha256` and, if there is one, `judge`."""
        found = {"extractor": self._extractor.name, "extractor_sha256": self._extractor.sha256}
        return found | ({} if self._judge is None else {"judge": self._judge.identity})

    def measure(self, task: PicturesTask | ImagesTask) -> tuple[str, Arrays]:
        """The task's name, and by name: `features` [B, W] and `judged` [B, D] float32 of images, preceded by "trained_"
        or "initial_" for pictures, with the prompts' `texts` [B, D] and the `shown` pictures, uint8 [shown, H, W, 3].

        Raises:
            ldm.errors.LdmError: a network can't be loaded or makes no numbers, or its package is missing.
            pipelines.dataset.errors.UnusableImage: a real image can't be decoded.
        """
        if isinstance(task, ImagesTask):
            images = self._real[task.split].rows(task.rows)
            return task.name, self._measured(images, "", features=task.features, judged=task.judged)
        return task.name, self._pictures_measured(task)

    def _pictures_measured(self, task: PicturesTask) -> Arrays:
        prompts = [shot.prompt for shot in task.shots]
        distinct = list(dict.fromkeys(prompts))
        conditioning = self._model.text_encoder.encode(distinct)[[distinct.index(prompt) for prompt in prompts]]
        arrays: dict[str, NDArray[Any]] = {}
        for network in task.networks:
            pictures = self._pictures(network, conditioning, task.shots)
            arrays |= self._measured(pictures, f"{network}_")
            if network == "trained" and task.shown:
                arrays["shown"] = pictures[: task.shown].numpy()
        if self._judge is not None:
            arrays["texts"] = self._judge.texts(prompts).numpy()
        return arrays

    def _pictures(self, network: str, conditioning: Conditioning, shots: Sequence[Shot]) -> Tensor:
        """Uint8 [B, H, W, 3]."""
        sampling = self._job.model.sampling
        latents = sample_latents(
            self._unets[network],
            self._model.diffusion,
            conditioning,
            self._model.text_encoder.null(len(shots)),
            seeded_noise([shot.seed for shot in shots], self._latent_shape),
            guidance=sampling.guidance_scale,
            sampler=sampling.sampler,
            steps=sampling.steps,
        )
        return decode_latents(self._model.autoencoder, latents)

    def _measured(self, images: Tensor, name: str, *, features: bool = True, judged: bool = True) -> Arrays:
        arrays = {f"{name}features": self._extractor(images).numpy()} if features else {}
        if judged and self._judge is not None:
            arrays[f"{name}judged"] = self._judge.images(images).numpy()
        return arrays

    @cached_property
    def _extractor(self) -> FeatureExtractor:
        return load_extractor(self._job.extractor, self._device)

    @cached_property
    def _judge(self) -> Judge | None:
        judge = self._job.judge
        if judge is None:
            return None
        from ldm.clip import load_clip

        return load_clip(
            judge if isinstance(judge, str) else fetch_folder(self._job.store, judge, "clip"), self._device
        )

    @cached_property
    def _unets(self) -> Mapping[str, Any]:
        trained = self._model.unet
        initial = initial_unet(trained.config, self._job.model.train.seed).to(self._device)
        predicts = any(bool(parameter.any()) for parameter in initial.conv_out.parameters())
        return {
            "trained": trained,
            "initial": initial.for_inference() if predicts else _Still(initial),
        }

    @cached_property
    def _real(self) -> Mapping[str, SelectedImages]:
        job, size_px = self._job, self._model.autoencoder.config.sample_size
        return {
            split: SelectedImages(job.store, job.acquire, job.select, split=split, size_px=size_px, cache_bytes=0)
            for split in ("train", "held_out")
        }

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        side = self._model.unet.config.sample_size
        return (self._model.autoencoder.config.latent_channels, side, side)


class _Still(nn.Module):
    """Stands for a U-Net whose last layer is zero, and which predicts 0 of whatever it is given: the same, at once."""

    def __init__(self, network: UNet2DCondition) -> None:
        super().__init__()
        self.conv_in = network.conv_in

    def forward(self, latents: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(latents)
