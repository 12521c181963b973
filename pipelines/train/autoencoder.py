"""Training a KL autoencoder on the selected images, and measuring what it does to held-out ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.autoencoder import AutoencoderKL
from ldm.features import ExtractorMissing, FeatureExtractor, load_extractor
from ldm.images import image_grid
from ldm.initial import initialise_autoencoder
from ldm.interchange import save_network
from ldm.latents import pixels_from_uint8, pixels_to_uint8, split_moments
from ldm.losses import AutoencoderLossWeights, autoencoder_loss
from ldm.metrics import frechet_distance_of_features, psnr
from ldm.perceptual import LEAST_PX, Perceptual, load_perceptual
from pipelines.artifacts import digest
from pipelines.dataset.acquired import acquired_of
from pipelines.dataset.figures import FRECHET_DISTANCE, Figure
from pipelines.dataset.images import SelectedImages
from pipelines.recipe import AutoencoderModel, Recipe
from pipelines.recipe.networks import autoencoder_config
from pipelines.recipe.weights import SCRATCH, load_autoencoder
from pipelines.train.errors import TrainError
from pipelines.train.job import TrainJob
from pipelines.train.order import Sample
from pipelines.train.pictures import png_bytes
from pipelines.train.randomness import Purpose, Randomness
from pipelines.train.trainable import Batch, Forward, Preview, TimedStep, Weights

PREVIEW_PICTURES = 8
PREVIEW_IMAGES = 64
FINAL_IMAGES = 256
SCALE_IMAGES = 512
MEASURED_AT_ONCE = 32

logger = logging.getLogger(__name__)


class AutoencoderTraining:
    """The autoencoder of a recipe and its images. See `trainable.Trainable`."""

    def __init__(self, job: TrainJob, device: torch.device) -> None:
        """
        Raises:
            TrainError: the network can't be built, doesn't fit the images' size, or what judges pictures is absent.
            UnusableData: there are no images of the train split.
        """
        assert isinstance(job.model, AutoencoderModel)
        self._name = job.name
        self._device = device
        self._execution = job.execution
        acquire, select = acquired_of(job.inputs), job.inputs["select"]
        self._train = SelectedImages(job.store, acquire, select, split="train")
        self._held_out = SelectedImages(job.store, acquire, select, split="held_out", size_px=self._train.size_px)
        self.num_samples = len(self._train)
        self.revision = digest([acquire.revision, select.revision])
        self._random = Randomness(job.model.train.seed)
        self._loss_weights = AutoencoderLossWeights(**job.model.loss.model_dump())
        self._config = autoencoder_config(job.model, self._train.size_px)
        self._perceptual = self._judge() if self._loss_weights.perceptual else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.model.train.seed)
            network = AutoencoderKL(self._config)
            if job.model.init == SCRATCH:
                initialise_autoencoder(network)
            else:
                load_autoencoder(network, job.model.init)
        self.module: nn.Module = network

    def batch(self, samples: Sequence[Sample]) -> Batch:
        rows = [sample.row for sample in samples]
        draws = list(zip(self._train.sample_ids(rows), (sample.epoch for sample in samples), strict=True))
        side = self._config.sample_size // self._config.downsampling
        noise = self._random.normal(Purpose.POSTERIOR_NOISE, draws, (self._config.latent_channels, side, side))
        return {"images": self._train.rows(rows), "noise": noise}

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        pixels = pixels_from_uint8(batch["images"])
        reconstruction, moments = forward(pixels, batch["noise"])
        return autoencoder_loss(reconstruction, pixels, moments, self._loss_weights, self._perceptual)

    def preview(self, weights: Weights) -> Preview:
        """Held-out images above their reconstructions, and their PSNR."""
        return self._measured(self._network(weights), PREVIEW_IMAGES)

    def write(self, weights: Weights, folder: Path) -> list[Figure]:
        """Writes `vae/`, with the scaling factor 1/std of the latents of at most `SCALE_IMAGES` train images.

        Raises `TrainError` if the latents have no such scale.
        """
        network = self._network(weights)
        std = self._latents_std(network)
        if not (math.isfinite(std) and std > 0):
            raise TrainError(
                f"the latents of {self._name} have a standard deviation of {std}: no scale makes them usable; lower"
                " train.optimizer.learning_rate, and train it anew"
            )
        network.config = replace(self._config, scaling_factor=1 / std)
        save_network(network, folder / "vae")
        return [Figure("latents_std", "train", std, count=min(SCALE_IMAGES, len(self._train)))]

    def measure(self, weights: Weights) -> Preview:
        """Beside PSNR, the Frechet distance of reconstructions from the held-out images, if `execution.extractor` is
        set and its package is there."""
        return self._measured(self._network(weights), FINAL_IMAGES, self._extractor())

    def _judge(self) -> Perceptual:
        weight, size_px = self._loss_weights.perceptual, self._train.size_px
        if size_px < LEAST_PX:
            raise TrainError(
                f"loss.perceptual = {weight} with images of {size_px} px: VGG16 takes {LEAST_PX} or more; change"
                " acquire.image.size_px, or leave the term out"
            )
        try:
            return load_perceptual(device=self._device)
        except ExtractorMissing as error:
            raise TrainError(f"loss.perceptual = {weight}: {error}, or leave the term out") from error

    def _network(self, weights: Weights) -> AutoencoderKL:
        network = AutoencoderKL(self._config)
        network.load_state_dict(dict(weights))
        return network.to(self._device).eval().requires_grad_(False)

    @torch.no_grad()
    def _latents_std(self, network: AutoencoderKL) -> float:
        """Of draws from the posterior, over all channels and positions (Rombach et al. 2022, appendix G)."""
        count, total, squares = 0, 0.0, 0.0
        for pixels in _batches(self._train, SCALE_IMAGES, self._device):
            mean, log_variance = (part.double() for part in split_moments(network.encode(pixels)))
            count += mean.numel()
            total += float(mean.sum())
            squares += float((mean.square() + log_variance.exp()).sum())
        variance = squares / count - (total / count) ** 2
        return math.sqrt(max(0.0, variance)) if math.isfinite(variance) else math.nan

    @torch.no_grad()
    def _measured(self, network: AutoencoderKL, limit: int, extractor: FeatureExtractor | None = None) -> Preview:
        if not len(self._held_out):
            return Preview()
        decibels: list[Tensor] = []
        pictures: list[Tensor] = []
        features: list[Tensor] = []
        for pixels in _batches(self._held_out, limit, self._device):
            reconstruction, _ = network(pixels)
            decibels.append(psnr(reconstruction, pixels).cpu())
            if not pictures:
                shown = torch.cat([pixels[:PREVIEW_PICTURES], reconstruction[:PREVIEW_PICTURES]])
                pictures.append(pixels_to_uint8(shown).cpu())
            if extractor is not None:
                features.append(torch.stack([extractor(pixels_to_uint8(part)) for part in (pixels, reconstruction)]))
        columns = len(pictures[0]) // 2
        picture = png_bytes(image_grid(pictures[0], columns=columns))
        values = torch.cat(decibels).double()
        count = len(values)
        error = float(values.std()) / math.sqrt(count) if count > 1 else None
        figures, beside = [Figure("psnr", "held_out", float(values.mean()), error=error, count=count)], []
        if extractor is not None and count > 1:
            originals, reconstructions = torch.cat(features, dim=1)
            distance = frechet_distance_of_features(reconstructions, originals)
            beside.append(Figure(FRECHET_DISTANCE, "held_out", distance, extractor.name, count=count))
        return Preview({"reconstructions": picture}, figures, beside)

    def _extractor(self) -> FeatureExtractor | None:
        if self._execution.extractor is None:
            return None
        try:
            return load_extractor(self._execution.extractor, self._device)
        except ExtractorMissing as error:
            logger.warning("held-out reconstructions are measured by PSNR alone: %s", error)
            return None


def _batches(images: SelectedImages, limit: int, device: torch.device) -> Iterator[Tensor]:
    """Pixels of at most `limit` images, evenly spaced through the split."""
    count = min(limit, len(images))
    rows = [at * len(images) // count for at in range(count)]
    for first in range(0, count, MEASURED_AT_ONCE):
        yield pixels_from_uint8(images.rows(rows[first : first + MEASURED_AT_ONCE]).to(device))


def timed_step(recipe: Recipe, model: AutoencoderModel, batch_size: int, device: torch.device) -> TimedStep:
    """The network and its forward pass on random images. See `kinds.TrainKind`."""
    size_px = recipe.acquire.image.size_px
    network = AutoencoderKL(autoencoder_config(model, size_px)).to(device)
    pixels = torch.rand(batch_size, network.config.in_channels, size_px, size_px, device=device) * 2 - 1
    return network, lambda: network(pixels)[0]
