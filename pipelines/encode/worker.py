"""A process that encodes shards: loads the autoencoder and the text encoder once, publishes one unit a shard.

Runs as a Ray actor; knows nothing of Ray.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from infra.storage import Store
from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.conditioning.text import TransformersTextEncoder, load_text_encoder
from ldm.features import FeatureExtractor, load_extractor
from ldm.interchange import load_network
from ldm.latents import pixels_from_uint8, pixels_to_uint8, split_moments
from pipelines.actors import batched
from pipelines.artifacts import Counts, Unit, fetch_file, fetch_folder
from pipelines.dataset.cache import ROWS_PER_BATCH, CacheRows, CacheSchema, Half, null_file, open_cache, write_cache
from pipelines.dataset.earlier import INPUTS, UNREADABLE, Copied, Inputs, inputs_bytes, inputs_of, recorded_file
from pipelines.dataset.errors import UnusableImage
from pipelines.dataset.facts import CacheFacts, NullFacts
from pipelines.dataset.images import square
from pipelines.dataset.samples import Sample, ShardSamples, with_ledger
from pipelines.dataset.selection import SIDES
from pipelines.dataset.shards import images_of
from pipelines.publishing import publish_unit
from pipelines.recipe import TextEncoder
from pipelines.recipe.plugins import Plugin, load_plugins

CONFIG, WEIGHTS = "vae/config.json", "vae/diffusion_pytorch_model.safetensors"
CACHE, NULL = "cache.arrow", "null.arrow"
Features = NDArray[np.float32]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodeJob:
    """What every shard of a node is encoded with, and where its units go. `autoencoder` has the folder `vae`."""

    store: Store
    node: str
    autoencoder: Unit
    text: TextEncoder
    batch_size: int
    plugins: tuple[Plugin, ...] = ()
    """Plugins that registered the extractor that measures what the cache decodes to."""


@dataclass(frozen=True)
class EncodeTask:
    """A unit to be made: what it holds, what it is known by, and which of its rows earlier units have."""

    samples: ShardSamples
    schema: CacheSchema
    made_with: str
    content: str
    unit_key: str
    copied: Sequence[Copied] = ()

    @property
    def unit_keys(self) -> tuple[str]:
        return (self.unit_key,)

    @property
    def num_images(self) -> int:
        """Number of images that are to be encoded."""
        return len(self.samples) - sum(len(copied.here) for copied in self.copied)


@dataclass(frozen=True)
class Row:
    """What is kept of a sample: moments [2C, h, w], text states [L, D], and how many tokens its caption has."""

    moments: Half
    text: Half
    caption_tokens: int


@dataclass(frozen=True)
class DecodeTask:
    """Some samples of a shard's published cache, to be decoded. `rows` are their places in it, `source` lists them."""

    source: ShardSamples
    unit: Unit
    rows: Sequence[int]
    extractor: str


class ShardEncoder:
    """Encodes one shard after another. Networks are loaded by the first call, so that it raises their errors."""

    def __init__(self, job: EncodeJob, device: str, threads: int) -> None:
        self._job = job
        self._device = torch.device(device)
        torch.set_num_threads(min(threads, len(os.sched_getaffinity(0))))

    def schema(self) -> CacheSchema:
        """Shapes of the cache, and what it is bound to. Loads the text encoder, whose hash is of its weights."""
        config = self._config
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

    def inputs(self, numbered: tuple[int, ShardSamples]) -> tuple[int, Inputs]:
        """What the samples are made from, with their number."""
        number, samples = numbered
        return number, _inputs(with_ledger(samples, self._job.store))

    def encode(self, task: EncodeTask) -> list[Unit]:
        """Encode and publish the samples of one shard, with the rows that earlier units have of them.

        Raises `UnusableImage` if an image is missing, can't be decoded, or has moments that float16 can't hold;
        `DatasetError` if the shard's ledger doesn't have a sample.
        """
        job = self._job
        samples = with_ledger(task.samples, job.store)
        earlier = _earlier_rows(task, job.store)
        captions_cut = 0
        with _scratch_file(f"{job.store.url}/{job.node}/{task.unit_key}") as path:
            with write_cache(path, task.schema) as writer:
                for batch in batched(zip(samples, self._rows(task, samples, earlier), strict=True), ROWS_PER_BATCH):
                    writer.append(_cache_rows(batch))
                    captions_cut += sum(row.caption_tokens > task.schema.text_shape[0] for _, row in batch)
            train, held_out = (list(task.samples.splits).count(side) for side in SIDES)
            facts = CacheFacts(
                shard=task.samples.shard,
                content=task.content,
                made_with=task.made_with,
                computed=len(samples) - len(earlier),
                copied=len(earlier),
                train=train,
                held_out=held_out,
                captions_cut=captions_cut,
            )
            files: dict[str, Path | bytes] = {CACHE: path, INPUTS: inputs_bytes(_inputs(samples))}
            counts = Counts(len(samples), len(samples))
            return [publish_unit(job.store, job.node, task.unit_key, files, counts, facts.info())]

    def encode_null(self, schema: CacheSchema, content: str, unit_key: str) -> Unit:
        """Publish the empty prompt's states."""
        states = self._text.null(1).context[0].half().cpu().numpy()
        files: dict[str, Path | bytes] = {NULL: null_file(schema, states)}
        return publish_unit(
            self._job.store, self._job.node, unit_key, files, Counts(0, 0), NullFacts(content=content).info()
        )

    def decoded_features(self, task: DecodeTask) -> tuple[str, Features, Features]:
        """The extractor's name, and features float32 [rows, width] of the images and of what the posterior means in the
        cache decode to.

        Raises `ldm.features.ExtractorMissing`.
        """
        cached = open_cache(fetch_file(self._job.store, task.unit, CACHE)).moments()
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
        load_plugins(self._job.plugins)
        return load_extractor(name, self._device)

    @property
    def _size_px(self) -> int:
        return self._config.sample_size

    @cached_property
    def _config(self) -> AutoencoderConfig:
        return AutoencoderConfig.from_dict(self._job.store.read_json(self._job.autoencoder.path(CONFIG)))

    @cached_property
    def _autoencoder(self) -> AutoencoderKL:
        network = load_network(AutoencoderKL, fetch_folder(self._job.store, self._job.autoencoder, "vae"))
        return network.to(self._device).for_inference()

    @cached_property
    def _text(self) -> TransformersTextEncoder:
        text = self._job.text
        return load_text_encoder(text.encoder, text.tokens, text.form).to(self._device)

    def _rows(self, task: EncodeTask, samples: Sequence[Sample], earlier: Mapping[int, Row]) -> Iterator[Row]:
        """Of each sample in turn: the earlier one where there is one, else computed, `batch_size` at a time."""
        missing = [sample for number, sample in enumerate(samples) if number not in earlier]
        computed = self._computed(task, missing)
        for number in range(len(samples)):
            yield earlier[number] if number in earlier else next(computed)

    def _computed(self, task: EncodeTask, samples: Sequence[Sample]) -> Iterator[Row]:
        images = images_of(task.samples.source, [sample.key for sample in samples], self._job.store)
        for batch in batched(zip(samples, images, strict=True), self._job.batch_size):
            captions = [sample.caption for sample, _ in batch]
            moments = self._moments([pixels for _, pixels in batch])
            text = self._text.encode(captions).context.half().cpu().numpy()
            for (sample, _), *row in zip(batch, moments, text, self._text.num_tokens(captions), strict=True):
                yield _checked(Row(*row), sample, task.samples.shard)

    @torch.inference_mode()
    def _moments(self, images: Sequence[NDArray[np.uint8]]) -> Half:
        pixels = torch.from_numpy(np.stack([square(image, self._size_px) for image in images]))
        moments = self._autoencoder.encode(pixels_from_uint8(pixels.to(self._device)))
        result: Half = moments.half().contiguous().cpu().numpy()
        return result


def _inputs(samples: Sequence[Sample]) -> Inputs:
    return inputs_of([sample.stored_sha256 for sample in samples], [sample.caption for sample in samples])


def _earlier_rows(task: EncodeTask, store: Store) -> dict[int, Row]:
    """Of those that the task says are in earlier units, all that can be read and are what was recorded."""
    found: dict[int, Row] = {}
    for copied in task.copied:
        try:
            file = open_cache(recorded_file(store, copied.unit, CACHE), task.schema.binding())
            moments, text = file.moments(), file.text()
            tokens = file.table.column("caption_tokens").to_pylist()
            for there, here in zip(copied.there.tolist(), copied.here.tolist(), strict=True):
                batch, row = divmod(there, ROWS_PER_BATCH)
                found[here] = Row(moments[batch][row], text[batch][row], tokens[there])
        except (*UNREADABLE, LookupError) as error:
            logger.warning("rows of unit %s are encoded again, not copied: %s", copied.unit.key, error)
    return found


def _checked(row: Row, sample: Sample, shard: str) -> Row:
    """The row. Raises `UnusableImage` if it has NaN or infinite values."""
    for name, values in (("posterior moments", row.moments), ("text states", row.text)):
        if not np.isfinite(values).all():
            raise UnusableImage(
                f"sample {sample.uid} ({sample.key!r} of shard {shard}, {sample.caption!r}) has {name} that are not"
                " numbers in float16; look at the image, and at how the autoencoder was trained"
            )
    return row


def _cache_rows(pairs: Sequence[tuple[Sample, Row]]) -> CacheRows:
    samples, rows = zip(*pairs, strict=True)
    return CacheRows(
        uid=[sample.uid for sample in samples],
        key=[sample.key for sample in samples],
        split=[sample.split for sample in samples],
        caption=[sample.caption for sample in samples],
        moments=np.stack([row.moments for row in rows]),
        text=np.stack([row.text for row in rows]),
        original_width=[sample.original_width for sample in samples],
        original_height=[sample.original_height for sample in samples],
        caption_tokens=[row.caption_tokens for row in rows],
    )


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
