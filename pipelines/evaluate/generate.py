"""A trained model put together from published networks, and pictures made with it; beside it the one it began as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from infra.storage import Store
from ldm.conditioning import TextEncoder
from ldm.diffusion import DiffusionConfig
from ldm.generate import LatentDiffusion, text_to_image
from ldm.unet import UNet2DCondition
from pipelines.artifacts import Unit
from pipelines.dataset.models import load_trained
from pipelines.recipe import TextToImageModel
from pipelines.recipe.networks import initial_unet, reading
from pipelines.recipe.plugins import Plugin, load_plugins

Network = Literal["trained", "initial"]


@dataclass(frozen=True)
class Shot:
    """One picture to make."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class GenerateJob:
    """What pictures are made with. `unet` and `autoencoder` are units with folders of these networks."""

    store: Store
    unet: Unit
    autoencoder: Unit
    model: TextToImageModel
    plugins: tuple[Plugin, ...] = ()
    """Plugins that registered names which the model's settings have."""


class Generator:
    """Makes pictures. Networks are loaded when they are first needed."""

    def __init__(self, job: GenerateJob, device: torch.device) -> None:
        self._job = job
        self._device = device

    @property
    def reads_with(self) -> str:
        """Who reads the prompts: the text encoder's identity."""
        return self._reading[0].identity

    def pictures(self, network: Network, shots: Sequence[Shot]) -> Tensor:
        """Uint8 [B, H, W, 3] on the CPU, of the trained network or of the same one before training.

        Raises `ldm.errors.LdmError` if the model can't be loaded or makes NaN.
        """
        load_plugins(self._job.plugins)
        sampling = self._job.model.sampling
        return text_to_image(
            self._trained if network == "trained" else self._initial,
            [shot.prompt for shot in shots],
            seeds=[shot.seed for shot in shots],
            guidance_scale=sampling.guidance_scale,
            sampler=sampling.sampler,
            steps=sampling.steps,
            batch_size=len(shots),
        )

    @cached_property
    def _reading(self) -> tuple[TextEncoder, DiffusionConfig]:
        return reading(self._job.model)

    @cached_property
    def _trained(self) -> LatentDiffusion:
        job = self._job
        return load_trained(job.store, job.unet, job.autoencoder, *self._reading).to(self._device).for_inference()

    @cached_property
    def _initial(self) -> LatentDiffusion:
        network = initial_unet(self._trained.unet.config, self._job.model.train.seed).to(self._device)
        predicts = any(bool(parameter.any()) for parameter in network.conv_out.parameters())
        unet: Any = network.for_inference() if predicts else _Still(network)
        return replace(self._trained, unet=unet)


class _Still(nn.Module):
    """Stands for a U-Net whose last layer is zero, and which predicts 0 of whatever it is given: the same, at once."""

    def __init__(self, network: UNet2DCondition) -> None:
        super().__init__()
        self.config = network.config
        self.conv_in = network.conv_in

    def forward(self, latents: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(latents)
