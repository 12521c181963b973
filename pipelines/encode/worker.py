"""A process that encodes shards: loads the autoencoder and the text encoder once, publishes one unit a shard.

Runs as a Ray actor; knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from infra.storage import Store
from ldm.autoencoder import AutoencoderKL
from ldm.conditioning.text import TransformersTextEncoder, load_text_encoder
from ldm.features import FeatureExtractor, load_extractor
from ldm.interchange import load_network
from ldm.latents import pixels_from_uint8, pixels_to_uint8, split_moments
from pipelines.actors import batched
from pipelines.artifacts import Counts, Unit, fetch_folder
from pipelines.building import publish_unit
from pipelines.dataset.cache import ROWS_PER_BATCH, CacheRows, CacheSchema, Half, null_file, open_cache, write_cache
from pipelines.dataset.errors import UnusableImage
from pipelines.dataset.images import square
from pipelines.dataset.samples import Sample, ShardTask, samples_of
from pipelines.dataset.shards import images_of
from pipelines.recipe import TextEncoder

WEIGHTS = "vae/diffusion_pytorch_model.safetensors"
Features = NDArray[np.float32]


@dataclass(frozen=True)
class EncodeJob:
    """What every shard of a node is encoded with, and where its units go. `autoencoder` has the folder `vae`."""

    store: Store
    node: str
    autoencoder: Unit
    text: TextEncoder
    batch_size: int


@dataclass(frozen=True)
class DecodeTask:
    """Some samples of a shard's published cache, to be decoded. `rows` are their places in it, `source` lists them."""

    source: ShardTask
    unit: Unit
    rows: Sequence[int]
    extractor: str


class ShardEncoder:
    """Encodes one shard after another. Networks are loaded by the first call, so that it raises their errors."""

    def __init__(self, job: EncodeJob, device: str, threads: int) -> None:
        self._job = job
        self._device = torch.device(device)
        torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))

    @cached_property
    def schema(self) -> CacheSchema:
        """Shapes of the cache, and what it is bound to."""
        config = self._autoencoder.config
        side = config.sample_size // config.downsampling
        (weights,) = (entry for entry in self._job.autoencoder.files if entry.name == WEIGHTS)
        return CacheSchema(
            moments_shape=(2 * config.latent_channels, side, side),
            text_shape=(self._text.length, self._text.width),
            autoencoder_sha256=weights.sha256,
            text_encoder=self._text.identity,
            text_form=self._job.text.form,
            transform=f"center_square {config.sample_size}",
        )

    def get_schema(self) -> CacheSchema:
        """`schema`, as a call to an actor."""
        return self.schema

    def encode(self, task: ShardTask) -> Unit:
        """Encode and publish the samples of one shard.

        Raises `UnusableImage` if an image is missing, can't be decoded, or has moments that float16 can't hold;
        `DatasetError` if the shard's ledger doesn't have a sample.
        """
        job = self._job
        samples = samples_of(task, job.store)
        captions_cut = 0
        with _scratch_file(f"{job.store.url}/{job.node}/{task.unit_key}") as path:
            with write_cache(path, self.schema) as writer:
                pairs = zip(samples, images_of(task.source, task.keys, job.store), strict=True)
                for batch in batched(pairs, job.batch_size):
                    rows = self._rows(task, batch)
                    writer.append(rows)
                    captions_cut += self._num_cut(rows.caption)
            sides = {side: list(task.splits).count(side) for side in ("train", "held_out")}
            info = {"shard": task.shard, "content": task.unit_key, "captions_cut": captions_cut, **sides}
            counts = Counts(len(samples), len(samples))
            return publish_unit(job.store, job.node, task.unit_key, {"cache.arrow": path}, counts, info)

    def encode_null(self, unit_key: str) -> Unit:
        """Publish the empty prompt's states."""
        states = self._text.null(1).context[0].half().cpu().numpy()
        files: dict[str, Path | bytes] = {"null.arrow": null_file(self.schema, states)}
        info = {"null": True, "content": unit_key}
        return publish_unit(self._job.store, self._job.node, unit_key, files, Counts(0, 0), info)

    def decoded_features(self, task: DecodeTask) -> tuple[str, Features, Features]:
        """The extractor's name, and features float32 [rows, width] of the images and of what the posterior means in the
        cache decode to.

        Raises `ldm.features.ExtractorMissing`.
        """
        cached = open_cache(self._job.store.fetch(task.unit.path("cache.arrow"))).moments()
        images = (
            square(image, self._size_px) for image in images_of(task.source.source, task.source.keys, self._job.store)
        )
        features: list[tuple[Features, Features]] = []
        for pairs in batched(zip(images, task.rows, strict=True), self._job.batch_size):
            originals = torch.from_numpy(np.stack([image for image, _ in pairs]))
            moments = np.stack([cached[row // ROWS_PER_BATCH][row % ROWS_PER_BATCH] for _, row in pairs])
            decoded = self._decoded(torch.from_numpy(moments))
            features.append((self._extract(originals, task.extractor), self._extract(decoded, task.extractor)))
        of_images, of_decoded = (np.concatenate(parts) for parts in zip(*features, strict=True))
        return self._extractor(task.extractor).name, of_images, of_decoded

    @torch.inference_mode()
    def _decoded(self, moments: torch.Tensor) -> torch.Tensor:
        mean, _ = split_moments(moments.float().to(self._device))
        return pixels_to_uint8(self._autoencoder.decode(mean)).cpu()

    def _extract(self, images: torch.Tensor, extractor: str) -> Features:
        return self._extractor(extractor)(images).numpy()

    @cache  # noqa: B019 - an encoder lives as long as its process
    def _extractor(self, name: str) -> FeatureExtractor:
        return load_extractor(name, self._device)

    @property
    def _size_px(self) -> int:
        return self._autoencoder.config.sample_size

    @cached_property
    def _autoencoder(self) -> AutoencoderKL:
        network = load_network(AutoencoderKL, fetch_folder(self._job.store, self._job.autoencoder, "vae"))
        return network.to(self._device).for_inference()

    @cached_property
    def _text(self) -> TransformersTextEncoder:
        text = self._job.text
        return load_text_encoder(text.encoder, text.tokens, text.form).to(self._device)

    def _rows(self, task: ShardTask, batch: Sequence[tuple[Sample, NDArray[np.uint8]]]) -> CacheRows:
        samples = [sample for sample, _ in batch]
        captions = [sample.caption for sample in samples]
        moments = self._moments([pixels for _, pixels in batch])
        text = self._text.encode(captions).context.half().cpu().numpy()
        for sample, own_moments, own_text in zip(samples, moments, text, strict=True):
            for name, values in (("posterior moments", own_moments), ("text states", own_text)):
                if not np.isfinite(values).all():
                    raise UnusableImage(
                        f"sample {sample.uid} ({sample.key!r} of shard {task.shard}, {sample.caption!r}) has {name}"
                        " that are not numbers in float16; look at the image, and at how the autoencoder was trained"
                    )
        return CacheRows(
            uid=[sample.uid for sample in samples],
            key=[sample.key for sample in samples],
            split=[sample.split for sample in samples],
            caption=captions,
            moments=moments,
            text=text,
            original_width=[sample.original_width for sample in samples],
            original_height=[sample.original_height for sample in samples],
        )

    @torch.inference_mode()
    def _moments(self, images: Sequence[NDArray[np.uint8]]) -> Half:
        pixels = torch.from_numpy(np.stack([square(image, self._size_px) for image in images]))
        moments = self._autoencoder.encode(pixels_from_uint8(pixels.to(self._device)))
        result: Half = moments.half().contiguous().cpu().numpy()
        return result

    def _num_cut(self, captions: Sequence[str]) -> int:
        return sum(count > self._text.length for count in self._text.num_tokens(list(captions)))


@contextmanager
def _scratch_file(name: str) -> Iterator[Path]:
    """A file on the node's disk for the block, always the same one for `name`: a killed process leaves one at most."""
    folder = Path(tempfile.gettempdir()) / f"latentworks-encode-{os.getuid()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.arrow"
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
