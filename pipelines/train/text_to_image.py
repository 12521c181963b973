"""Training a latent diffusion U-Net on a latent cache, and looking at what it makes of fixed prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.autoencoder import AutoencoderKL
from ldm.conditioning.text import load_text_encoder
from ldm.diffusion import Diffusion
from ldm.generate import LatentDiffusion, text_to_image
from ldm.images import image_grid
from ldm.interchange import load_network, save_network
from ldm.latents import sample_posterior, scale_latents
from ldm.schedules import stratified
from ldm.unet import UNet2DCondition
from pipelines.artifacts import Unit, fetch_folder
from pipelines.dataset.figures import Figure
from pipelines.recipe import AutoencoderModel, Recipe, TextToImageModel
from pipelines.recipe.networks import autoencoder_config, diffusion_config, initial_unet, unet_config
from pipelines.train.job import TrainJob
from pipelines.train.loader import LatentCache
from pipelines.train.order import Sample
from pipelines.train.pictures import png_bytes
from pipelines.train.randomness import Purpose, Randomness
from pipelines.train.trainable import Batch, Forward, Preview, TimedStep, Weights

AUTOENCODER_WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
PREVIEW_BATCH_SIZE = 16


class TextToImageTraining:
    """The U-Net of a recipe, its cache and its first stage. See `trainable.Trainable`."""

    def __init__(self, job: TrainJob, device: torch.device, *, previews: bool) -> None:
        """
        Raises:
            pipelines.dataset.errors.CacheMismatch: the cache was made with another first stage or text encoder.
            ldm.errors.LdmError: the network can't be built, or the first stage or the text encoder can't be loaded.
            UnusableData: there are no samples of the train split.
        """
        assert isinstance(job.model, TextToImageModel)
        self._device = device
        self._model = job.model
        encoded, (first_stage,) = job.inputs[f"encode.{job.name}"], job.inputs[f"train.{job.model.first_stage}"].units
        self._autoencoder = load_network(AutoencoderKL, fetch_folder(job.store, first_stage, "vae")).eval()
        self._text_encoder = load_text_encoder(job.model.text.encoder, job.model.text.tokens) if previews else None
        self._cache = LatentCache(job.store, encoded.units, self._binding(first_stage))
        self._null_text = self._cache.null_text()
        self.num_samples = len(self._cache)
        self.revision = encoded.revision
        self._random = Randomness(job.model.train.seed)
        self._diffusion = Diffusion(diffusion_config(job.model))
        moments_channels, sample_size, _ = self._cache.schema.moments_shape
        self._config = unet_config(
            job.model,
            latent_channels=moments_channels // 2,
            sample_size=sample_size,
            context_width=self._cache.schema.text_shape[1],
        )
        self.module: nn.Module = initial_unet(self._config, job.model.train.seed)

    def batch(self, samples: Sequence[Sample]) -> Batch:
        cached = self._cache.rows([sample.row for sample in samples])
        draws = list(zip(cached.sample_ids, (sample.epoch for sample in samples), strict=True))
        moments = cached.moments.float()
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        posterior_noise = self._random.normal(Purpose.POSTERIOR_NOISE, draws, shape)
        dropped = self._random.uniform(Purpose.CAPTION_DROPOUT, draws) < self._model.diffusion.caption_dropout
        noise = self._random.normal(Purpose.DIFFUSION_NOISE, draws, shape)
        if self._diffusion.config.offset_noise:
            noise = self._diffusion.offset(noise, self._random.normal(Purpose.OFFSET_NOISE, draws, shape[:1]))
        batch = {
            "latents": scale_latents(sample_posterior(moments, posterior_noise), self._autoencoder.config),
            "noise": noise,
            "times": self._diffusion.timesteps_from_uniform(self._quantiles(samples, draws)),
            "context": torch.where(dropped[:, None, None], self._null_text, cached.text),
        }
        if self._diffusion.config.input_perturbation:
            more = self._random.normal(Purpose.INPUT_PERTURBATION, draws, shape)
            batch["seen_noise"] = self._diffusion.perturbed(noise, more)
        return batch

    def _quantiles(self, samples: Sequence[Sample], draws: Sequence[tuple[int, int]]) -> Tensor:
        """Of the samples' times, in [0, 1)."""
        quantiles = self._random.uniform(Purpose.TIMESTEP, draws)
        if not self._model.diffusion.stratified_timesteps:
            return quantiles
        strata = torch.tensor([sample.stratum for sample in samples])
        return stratified(quantiles, strata, self._model.train.global_batch_size)

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        latents, noise, times = batch["latents"], batch["noise"], batch["times"]
        noised = self._diffusion.noised(latents, batch.get("seen_noise", noise), times)
        inputs = self._diffusion.scale_input(noised, self._diffusion.alpha_sigma(times)[1])
        output = forward(inputs, self._diffusion.model_time(times), batch["context"].float())
        return self._diffusion.loss(output, latents, noise, times).mean(), {}

    def preview(self, weights: Weights) -> Preview:
        """Pictures of the recipe's prompts, from seeds that count up from the recipe's."""
        assert self._text_encoder is not None, "this process was not to be asked for previews"
        sampling = self._model.sampling
        autoencoder = self._autoencoder.to(self._device)
        images = text_to_image(
            LatentDiffusion(self._network(weights), autoencoder, self._text_encoder, self._diffusion),
            list(sampling.prompts),
            seeds=[sampling.seed + index for index in range(len(sampling.prompts))],
            guidance_scale=sampling.guidance_scale,
            sampler=sampling.sampler,
            steps=sampling.steps,
            batch_size=PREVIEW_BATCH_SIZE,
        )
        return Preview({"samples": png_bytes(image_grid(images, columns=min(8, len(images))))})

    def write(self, weights: Weights, folder: Path) -> list[Figure]:
        """Writes `unet/`; without figures."""
        save_network(self._network(weights), folder / "unet")
        return []

    def measure(self, weights: Weights) -> Preview:
        """What `preview` gives: figures are the node `evaluate`'s matter."""
        return self.preview(weights)

    def _network(self, weights: Weights) -> UNet2DCondition:
        network = UNet2DCondition(self._config)
        network.load_state_dict(dict(weights))
        return network.to(self._device).for_inference()

    def _binding(self, first_stage: Unit) -> dict[str, Any]:
        """What the cache must have been made with."""
        (weights,) = (entry for entry in first_stage.files if entry.name == AUTOENCODER_WEIGHTS)
        binding: dict[str, Any] = {"autoencoder_sha256": weights.sha256, "text_form": self._model.text.form}
        if self._text_encoder is not None:
            binding["text_encoder"] = self._text_encoder.identity
            binding["text_shape"] = [self._text_encoder.length, self._text_encoder.width]
        return binding


def timed_step(recipe: Recipe, model: TextToImageModel, batch_size: int, device: torch.device) -> TimedStep:
    """The U-Net and its forward pass on random latents. See `kinds.TrainKind`."""
    first_stage, size_px = recipe.models[model.first_stage], recipe.acquire.image.size_px
    assert isinstance(first_stage, AutoencoderModel)  # the recipe has checked it
    latents = autoencoder_config(first_stage, size_px)
    config = unet_config(
        model,
        latent_channels=latents.latent_channels,
        sample_size=size_px // latents.downsampling,
        context_width=load_text_encoder(model.text.encoder, model.text.tokens).width,
    )
    network = initial_unet(config, model.train.seed).to(device)
    side, width = config.sample_size, config.cross_attention_dim
    noised = torch.randn(batch_size, config.in_channels, side, side, device=device)
    times = torch.rand(batch_size, device=device) * 1000
    context = torch.randn(batch_size, model.text.tokens, width, device=device)
    return network, lambda: network(noised, times, context)
