"""Node `encode.<model>`: what a text-to-image model is trained on, computed once. One unit a shard of `acquire`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from infra.storage import Store
from pipelines.artifacts import Artifact, Identity, Unit, finished
from pipelines.building import Build, building
from pipelines.recipe import Execution, TextToImageModel
from pipelines.reporting import Report

if TYPE_CHECKING:
    from pipelines.actors import Pool
    from pipelines.dataset.samples import ShardTask
    from pipelines.encode.worker import DecodeTask

FORMAT_VERSION = 1
DECODED_IMAGES = 512


def identity(model: TextToImageModel) -> Identity:
    """All of the recipe that affects the cache: how captions are read. Images are encoded as the first stage says."""
    return Identity({"text": model.text.content()}, {"text": model.text.model_dump(mode="json")})


def encode(
    model_name: str,
    model: TextToImageModel,
    inputs: Mapping[str, Artifact],
    store: Store,
    report: Report,
    execution: Execution,
) -> Artifact:
    """Encode every selected sample, of both splits. Ray is initialised if there is something to encode.

    Raises:
        pipelines.dataset.errors.DatasetError: a selected image is missing, damaged, or can't be stored.
        ldm.errors.LdmError: the autoencoder or the text encoder can't be loaded.
        infra.locks.Locked: another run is at it.
    """
    node = f"encode.{model_name}"
    found = finished(store, node, identity(model), inputs, FORMAT_VERSION)
    if found is not None:
        return found
    how = execution.model_dump(mode="json")
    with building(store, node, identity(model), inputs, how, FORMAT_VERSION) as build:
        return _build(build, model, report, execution)


def _build(build: Build, model: TextToImageModel, report: Report, execution: Execution) -> Artifact:
    from pipelines.actors import actor_pool, make_units
    from pipelines.dataset.samples import shard_tasks
    from pipelines.encode.worker import EncodeJob, ShardEncoder

    (autoencoder,) = build.inputs[f"train.{model.first_stage}"].units
    tasks = shard_tasks(build.inputs["acquire"], build.inputs["select"], build.store)
    job = EncodeJob(build.store, build.stage, autoencoder, model.text, model.encode.batch_size)
    workers = min(execution.encode_workers, len(tasks))
    with actor_pool(ShardEncoder, job, workers=workers, device=execution.device) as pool:
        report.progress(0, sum(len(task.keys) for task in tasks), "images", "loading")
        schema = pool.call("get_schema")
        binding = schema.binding()
        keyed = [replace(task, unit_key=build.unit_key({"made_with": binding, **task.content})) for task in tasks]
        units = make_units(build, keyed, pool, "encode", report)
        null_key = build.unit_key({"made_with": binding, "null": True})
        null = build.find_unit(null_key) or pool.call("encode_null", null_key)
        distance = _decoded_distance(build, keyed, units, pool, execution.extractor, report)
    captions_cut = sum(int(unit.info["captions_cut"]) for unit in units)
    report.metrics({"captions_cut": float(captions_cut), **distance})
    if captions_cut:
        report.note(f"{build.stage}: {captions_cut:,} captions have more than {model.text.tokens} tokens and are cut")
    return build.publish([*units, null], info={**binding, "captions_cut": captions_cut, **distance})


def _decoded_distance(
    build: Build, tasks: list[ShardTask], units: list[Unit], pool: Pool, extractor: str | None, report: Report
) -> dict[str, float]:
    """`decoded_fd_<extractor>`: the Frechet distance of what the cache decodes to from the images it was made of, over
    at most `DECODED_IMAGES` of them, evenly spaced. Empty without an extractor or its package."""
    if extractor is None:
        return {}
    import numpy as np
    import torch

    from ldm.features import ExtractorMissing
    from ldm.metrics import frechet_distance_of_features

    try:
        parts = list(pool.map("decoded_features", _decode_tasks(tasks, units, extractor)))
    except ExtractorMissing as error:
        report.note(f"{build.stage}: what the cache decodes to is not measured: {error}")
        return {}
    if sum(len(images) for _, images, _ in parts) < 2:
        return {}
    # Joined by a copy: what comes from other processes can't be written to, which torch warns of.
    images, decoded = (torch.from_numpy(np.concatenate([part[side] for part in parts])) for side in (1, 2))
    return {f"decoded_fd_{parts[0][0]}": frechet_distance_of_features(decoded, images)}


def _decode_tasks(tasks: list[ShardTask], units: list[Unit], extractor: str) -> list[DecodeTask]:
    from pipelines.encode.worker import DecodeTask

    total = sum(len(task.keys) for task in tasks)
    count = min(DECODED_IMAGES, total)
    chosen = {number * total // count for number in range(count)}
    decode_tasks, first = [], 0
    for task, unit in zip(tasks, units, strict=True):
        rows = [row for row in range(len(task.keys)) if first + row in chosen]
        first += len(task.keys)
        if rows:
            uids, keys, splits = ([of[row] for row in rows] for of in (task.uids, task.keys, task.splits))
            some = replace(task, uids=uids, keys=keys, splits=splits)
            decode_tasks.append(DecodeTask(some, unit, rows, extractor))
    return decode_tasks
