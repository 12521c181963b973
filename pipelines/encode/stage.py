"""Node `encode.<model>`: what a text-to-image model is trained on, computed once. One unit a shard of `acquire`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from infra.storage import Store
from pipelines.artifacts import Artifact, Identity, Unit, digest
from pipelines.building import Build, find_or_build
from pipelines.dataset.facts import CacheFacts
from pipelines.dataset.figures import FIGURES, FRECHET_DISTANCE, Figure, metrics_of, records
from pipelines.recipe import Execution, TextToImageModel
from pipelines.recipe.registered import plugins_used
from pipelines.reporting import Report

if TYPE_CHECKING:
    from pipelines.actors import Pool
    from pipelines.dataset.cache import CacheSchema
    from pipelines.dataset.earlier import KnownUnits
    from pipelines.dataset.samples import ShardSamples
    from pipelines.encode.worker import DecodeTask, EncodeTask

FORMAT_VERSION = 2
DECODED_IMAGES = 512


def identity(model: TextToImageModel) -> Identity:
    """All of the recipe that affects the cache: how captions are read. Images are encoded as the first stage says."""
    settings = model.model_dump(mode="json", include={"text", "encode"})
    return Identity({"text": model.text.content()} | _how(model), settings)


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
    build = partial(_build, model=model, report=report, execution=execution)
    how = execution.model_dump(mode="json")
    return find_or_build(store, f"encode.{model_name}", identity(model), inputs, how, FORMAT_VERSION, build)


def _build(build: Build, model: TextToImageModel, report: Report, execution: Execution) -> Artifact:
    from pipelines.actors import actor_pool, make_units
    from pipelines.dataset.acquired import acquired_of
    from pipelines.dataset.earlier import KnownUnits
    from pipelines.dataset.samples import selected_samples
    from pipelines.encode.worker import EncodeJob, ShardEncoder

    (autoencoder,) = build.inputs[f"train.{model.first_stage}"].units
    shards = selected_samples(acquired_of(build.inputs), build.inputs["select"], build.store)
    plugins = plugins_used(extractors=[execution.extractor])
    job = EncodeJob(build.store, build.stage, autoencoder, model.text, model.encode.batch_size, plugins)
    workers = min(execution.encode_workers, len(shards))
    with actor_pool(ShardEncoder, job, workers=workers, device=execution.device) as pool:
        report.progress(0, sum(map(len, shards)), "images", "loading")
        schema = pool.call("schema")
        made_with = schema.binding() | _how(model)
        known = KnownUnits(build.store, build.stage, [_of_rows(build, made_with)], build.again)
        tasks = _tasks(build, shards, schema, made_with)
        found = {task.unit_key: unit for task in tasks if (unit := known.find(task.unit_key)) is not None}
        missing = _with_earlier_rows(
            build, [task for task in tasks if task.unit_key not in found], known, pool, but=tasks
        )
        found |= make_units(build, missing, pool, "encode", report, total=sum(map(len, shards)))
        null = _null(build, schema, made_with, pool)
        units = [found[task.unit_key] for task in tasks]
        new = [(samples, unit) for samples, unit in zip(shards, units, strict=True) if unit.key not in known.listed]
        distance = _decoded_distance(build, new, pool, execution.extractor, report)
    captions_cut = sum(CacheFacts.of(unit).captions_cut for unit in units)
    report.metrics({"captions_cut": float(captions_cut), **metrics_of(distance)})
    if captions_cut:
        report.note(f"{build.stage}: {captions_cut:,} captions have more than {model.text.tokens} tokens and are cut")
    told = {"captions_cut": captions_cut, FIGURES: records(distance)}
    return build.publish([*units, null], info=schema.binding() | told)


def _how(model: TextToImageModel) -> dict[str, Any]:
    """What the recipe's `encode` block asks for, if anything."""
    how = model.encode.content()
    return {"encode": how} if how else {}


def _of_rows(build: Build, made_with: Mapping[str, Any]) -> str:
    """By which units are known whose rows are made alike."""
    return digest({"format": build.format_version, **made_with})


def _tasks(
    build: Build, shards: Sequence[ShardSamples], schema: CacheSchema, made_with: Mapping[str, Any]
) -> list[EncodeTask]:
    from pipelines.encode.worker import EncodeTask

    tasks = []
    for samples in shards:
        content = build.base_key({"made_with": made_with, **samples.content})
        tasks.append(EncodeTask(samples, schema, _of_rows(build, made_with), content, build.current(content)))
    return tasks


def _with_earlier_rows(
    build: Build, missing: Sequence[EncodeTask], known: KnownUnits, pool: Pool, but: Sequence[EncodeTask]
) -> list[EncodeTask]:
    """The tasks, which say now what they have in common with earlier units other than those of `but`."""
    from pipelines.dataset.earlier import copied_rows

    earlier = known.earlier(missing[0].made_with, but={task.unit_key for task in but}) if missing else []
    if not earlier:
        return list(missing)
    inputs = dict(pool.map("inputs", [(number, task.samples) for number, task in enumerate(missing)]))
    copied = copied_rows(build.store, [inputs[number] for number in range(len(missing))], earlier)
    return [replace(task, copied=own) for task, own in zip(missing, copied, strict=True)]


def _null(build: Build, schema: CacheSchema, made_with: Mapping[str, Any], pool: Pool) -> Unit:
    content = build.base_key({"made_with": made_with, "null": True})
    unit_key = build.current(content)
    found = build.find_unit(unit_key)
    if found is None:
        made: Unit = pool.call("encode_null", schema, content, unit_key)
        return made
    return found


def _decoded_distance(
    build: Build, made: Sequence[tuple[ShardSamples, Unit]], pool: Pool, extractor: str | None, report: Report
) -> list[Figure]:
    """The Frechet distance of what the units decode to from the images they were made of,
    over at most `DECODED_IMAGES` of them, evenly spaced.

    `made` are units that no revision listed before. Empty if fewer images were encoded for them than would be decoded;
    and without an extractor or its package.
    """
    encoded = sum(CacheFacts.of(unit).computed for _, unit in made)
    tasks = _decode_tasks(made, extractor or "")
    if extractor is None or encoded < max(2, sum(len(task.rows) for task in tasks)):
        return []
    import numpy as np
    import torch

    from ldm.features import ExtractorMissing
    from ldm.metrics import frechet_distance_of_features

    try:
        parts = list(pool.map("decoded_features", tasks))
    except ExtractorMissing as error:
        report.note(f"{build.stage}: what the cache decodes to is not measured: {error}")
        return []
    # Joined by a copy: what comes from other processes can't be written to, which torch warns of.
    images, decoded = (torch.from_numpy(np.concatenate([part[side] for part in parts])) for side in (1, 2))
    distance = frechet_distance_of_features(decoded, images)
    return [Figure(FRECHET_DISTANCE, "reconstructions", distance, parts[0][0], count=len(images))]


def _decode_tasks(made: Sequence[tuple[ShardSamples, Unit]], extractor: str) -> list[DecodeTask]:
    from pipelines.encode.worker import DecodeTask

    total = sum(len(samples) for samples, _ in made)
    count = min(DECODED_IMAGES, total)
    chosen = {number * total // count for number in range(count)}
    tasks, first = [], 0
    for samples, unit in made:
        rows = [row for row in range(len(samples)) if first + row in chosen]
        first += len(samples)
        if rows:
            uids, keys, splits = ([of[row] for row in rows] for of in (samples.uids, samples.keys, samples.splits))
            tasks.append(DecodeTask(replace(samples, uids=uids, keys=keys, splits=splits), unit, rows, extractor))
    return tasks
