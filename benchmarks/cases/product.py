"""The product's own training step beside the bare network, for `benchmarks/gpu.py`: `infra.engine.Engine` (DeepSpeed
ZeRO) alone, and `pipelines.train.step.train_step` with the order of samples and the loader of a real, small cache.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases.full_size import Scale, Step, training_inputs, unet_tflop
from cases.measure import Call, Meter, Place
from torch import Tensor

from infra.engine import Engine
from infra.ranks import join_process_group
from infra.storage import Store
from ldm.autoencoder import AutoencoderConfig, AutoencoderKL
from ldm.interchange import save_network
from pipelines.artifacts import Artifact, Counts, Identity
from pipelines.building import building
from pipelines.dataset.cache import CacheRows, CacheSchema, null_file, write_cache
from pipelines.publishing import publish_unit
from pipelines.recipe import Execution, TextToImageModel
from pipelines.train.job import TrainJob
from pipelines.train.loop import make_engine_spec
from pipelines.train.order import Order
from pipelines.train.step import train_step
from pipelines.train.text_to_image import TextToImageTraining

BARE, ENGINE, STEP = "bare", "Engine", "train_step"
BATCHES = 4
"""Of the cache: enough for steps to read other rows than the last."""


def product(meter: Meter, scale: Scale, ways: tuple[str, ...]) -> None:
    """Eager alone, as the product trains."""
    if "eager" not in ways:
        return
    device = "cuda" if meter.device.startswith("cuda") else "cpu"
    size_px, batch = scale.train[0]
    with tempfile.TemporaryDirectory() as folder, join_process_group(device):
        job = make_job(Path(folder), scale, size_px, batch, device)
        place = partial(Place, "product", how="eager", size_px=size_px, batch=batch)
        for who, make in ((BARE, _bare), (ENGINE, _engine), (STEP, _step)):
            training = TextToImageTraining(job, torch.device(meter.device), previews=False)
            config = training.module.config
            tflop = 3 * unet_tflop(config, config.sample_size, scale.context)
            meter.measure(
                place(who=who, tflop_per_image=tflop), partial(make, training, job, scale, size_px, batch, meter.device)
            )
            del training


class _Steps:
    """Steps, and what frees the engine. Each sees other noise: their losses are no results to compare."""

    def __init__(self, step: Callable[[], object], close: Callable[[], None] | None = None) -> None:
        self._step, self.close = step, close

    def __call__(self) -> Tensor:
        self._step()
        return torch.ones(1)


def _bare(training: TextToImageTraining, _job: TrainJob, scale: Scale, size_px: int, batch: int, device: str) -> Call:
    network = copy.deepcopy(training.module).to(device).to(memory_format=torch.channels_last)
    return _Steps(Step(network, *training_inputs(scale, size_px, batch, device), compiled=False))


def _engine(training: TextToImageTraining, job: TrainJob, *_: Any) -> Call:
    engine = _built(training, job)
    samples = _order(training, job).block(0, 0, 1)
    inputs = {name: values.to(engine.device) for name, values in training.batch(samples).items()}

    def step() -> None:
        loss, _ = training.loss(engine, inputs)
        engine.backward(loss)
        engine.step(job.model.train.optimizer.learning_rate)

    return _Steps(step, engine.close)


def _step(training: TextToImageTraining, job: TrainJob, *_: Any) -> Call:
    engine = _built(training, job)
    order = _order(training, job)
    numbers = itertools.count()

    def step() -> None:
        samples = order.block(next(numbers), 0, 1)
        result = train_step(engine, training, samples, job.model.train.optimizer.learning_rate, 0.9999)
        if not result.applied:
            raise RuntimeError("gradients were not finite")

    return _Steps(step, engine.close)


def _built(training: TextToImageTraining, job: TrainJob) -> Engine:
    device = torch.device(job.execution.device)
    return Engine.build(training.module, make_engine_spec(job.model.train, job.execution, 1, device))


def _order(training: TextToImageTraining, job: TrainJob) -> Order:
    spec = job.model.train
    return Order(
        seed=spec.seed,
        revision=training.revision,
        num_rows=training.num_samples,
        lanes=spec.lanes,
        global_batch_size=spec.global_batch_size,
    )


def make_job(folder: Path, scale: Scale, size_px: int, batch: int, device: Any) -> TrainJob:
    """A training of a U-Net of the scale's widths on a cache of random latents, in a store under `folder`."""
    store = Store(folder / "store")
    model = TextToImageModel.model_validate(
        {
            "kind": "text_to_image",
            "first_stage": "autoencoder",
            "text": {"tokens": max(4, scale.context[0])},
            "network": {
                "block_out_channels": scale.unet.block_out_channels,
                "cross_attention": [kind.startswith("CrossAttn") for kind in scale.unet.down_block_types],
            },
            "train": {
                "steps": 1_000_000,
                "global_batch_size": batch,
                "lanes": 1,
                "precision": "bf16" if device == "cuda" else "fp32",
            },
            "sampling": {"prompts": ["nothing"]},
        },
        strict=False,
    )
    first_stage = _published(store, "train.autoencoder", [(_autoencoder_files(folder), Counts(1, 1), {})], {})
    weights = next(entry for entry in first_stage.units[0].files if entry.name.endswith(".safetensors"))
    schema = CacheSchema(
        moments_shape=(2 * scale.unet.in_channels, *(size_px // scale.autoencoder.downsampling,) * 2),
        text_shape=scale.context,
        autoencoder_sha256=weights.sha256,
        text_encoder="random",
        text_form="padded",
        transform=f"center_square {size_px}",
    )
    inputs = {"train.autoencoder": first_stage, "encode.base": _cache(store, folder, schema, BATCHES * batch)}
    return TrainJob("base", model, inputs, store, Execution(device=device), "unit", "line")


def _autoencoder_files(folder: Path) -> dict[str, bytes]:
    """Only the scale of its latents is read."""
    network = AutoencoderKL(AutoencoderConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4))
    save_network(network, folder / "vae")
    return {f"vae/{path.name}": path.read_bytes() for path in (folder / "vae").iterdir()}


def _cache(store: Store, folder: Path, schema: CacheSchema, count: int) -> Artifact:
    random = np.random.default_rng(0)
    path = folder / "cache.arrow"
    numbers = range(count)
    with write_cache(path, schema) as writer:
        writer.append(
            CacheRows(
                uid=[f"{number:032x}" for number in numbers],
                key=[f"{number:09d}" for number in numbers],
                split=["train"] * count,
                caption=["noise"] * count,
                moments=random.normal(size=(count, *schema.moments_shape)).astype(np.float16),
                text=random.normal(size=(count, *schema.text_shape)).astype(np.float16),
                original_width=(),
                original_height=(),
            )
        )
    null = null_file(schema, np.zeros(schema.text_shape, np.float16))
    units = [
        ({"cache.arrow": path.read_bytes()}, Counts(count, count), {"train": count, "held_out": 0}),
        ({"null.arrow": null}, Counts(0, 0), {"null": True}),
    ]
    return _published(store, "encode.base", units, schema.binding())


def _published(
    store: Store, node: str, units: list[tuple[dict[str, bytes], Counts, dict[str, Any]]], info: dict[str, Any]
) -> Artifact:
    with building(store, node, Identity({}, {}), {}, {}, 1) as build:
        done = [
            publish_unit(store, node, build.unit_key({"unit": number}), files, counts, about)
            for number, (files, counts, about) in enumerate(units)
        ]
        return build.publish(done, info=info)
