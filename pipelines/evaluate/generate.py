"""A trained model put together from published networks, and pictures made with it.

`Generator` runs as a Ray actor; nothing here knows of Ray.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from infra.storage import Store
from ldm.generate import LatentDiffusion, text_to_image
from pipelines.artifacts import Unit
from pipelines.dataset.models import load_trained
from pipelines.recipe import TextToImageModel
from pipelines.recipe.networks import reading


@dataclass(frozen=True)
class Shot:
    """One picture to make."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class GenerateJob:
    """With what pictures are made. `unet` and `autoencoder` are units with folders of these networks."""

    store: Store
    unet: Unit
    autoencoder: Unit
    model: TextToImageModel


class Generator:
    """Makes pictures, batch after batch. The model is loaded by the first call, so that it raises its errors."""

    def __init__(self, job: GenerateJob, device: str, threads: int) -> None:
        self._job = job
        self._device = torch.device(device)
        torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))

    def generate(self, batch: tuple[int, Sequence[Shot]]) -> tuple[int, NDArray[np.uint8]]:
        """Uint8 [B, H, W, 3] of the shots, with the batch's number.

        Raises `ldm.errors.LdmError` if the model can't be loaded or makes no numbers.
        """
        number, shots = batch
        sampling = self._job.model.sampling
        images = text_to_image(
            self._model,
            [shot.prompt for shot in shots],
            seeds=[shot.seed for shot in shots],
            guidance_scale=sampling.guidance_scale,
            sampler=sampling.sampler,
            steps=sampling.steps,
            batch_size=len(shots),
        )
        return number, images.numpy()

    @cached_property
    def _model(self) -> LatentDiffusion:
        job = self._job
        return load_trained(job.store, job.unet, job.autoencoder, *reading(job.model)).to(self._device).for_inference()
