"""Node `evaluate.<model>`: pictures of the recipe's prompts by the averaged weights, singly and as one grid.

If the recipe asks for it, pictures of the data's own captions are measured as well: see `measure` and `figures`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts, Identity, Unit, finished
from pipelines.building import Build, building, publish_unit
from pipelines.recipe import Execution, Sampling, TextToImageModel
from pipelines.reporting import Report

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.actors import Pool
    from pipelines.evaluate.generate import GenerateJob, Shot
    from pipelines.evaluate.measure import Measurement, Result

FORMAT_VERSION = 1
BATCH_SIZE = 16
FEW_PROMPTS = 16
"""Up to so many prompts get a picture from each of `SEEDS_PER_PROMPT` seeds: a row of the grid. More get one each."""
SEEDS_PER_PROMPT = 2
GRID_COLUMNS = 8
MIN_IMAGES = 2
"""On either side of a comparison: a covariance of fewer there is not."""


def identity(model: TextToImageModel) -> Identity:
    """All of the recipe that affects pictures and figures, apart from what the weights were made with."""
    known = {name: getattr(model, name).content() for name in ("text", "diffusion", "sampling")}
    if model.evaluate is not None:
        known["evaluate"] = model.evaluate.content()
        if model.evaluate.untrained:
            known["initial"] = {"network": model.network.content(), "seed": model.train.seed}
    settings = model.model_dump(mode="json", include={"text", "diffusion", "sampling", "evaluate"})
    return Identity(known, settings | ({"initial": known["initial"]} if "initial" in known else {}))


def evaluate(
    model_name: str,
    model: TextToImageModel,
    inputs: Mapping[str, Artifact],
    store: Store,
    report: Report,
    execution: Execution,
) -> Artifact:
    """Sample from the trained model, and measure it. Ray is initialised if there is something to sample.

    Raises:
        ldm.errors.LdmError: the model can't be loaded, or makes no numbers; extractor or judge are missing.
        pipelines.dataset.errors.UnusableImage: a real image can't be decoded.
        infra.locks.Locked: another run is at it.
    """
    node = f"evaluate.{model_name}"
    found = finished(store, node, identity(model), inputs, FORMAT_VERSION)
    if found is not None:
        return found
    how = execution.model_dump(mode="json")
    with building(store, node, identity(model), inputs, how, FORMAT_VERSION) as build:
        (unet,) = inputs[f"train.{model_name}"].units
        (autoencoder,) = inputs[f"train.{model.first_stage}"].units
        others = {name: inputs[name].revision for name in inputs if name not in (unet.stage, autoencoder.stage)}
        made_with = {"unet": folder_hashes(unet, "unet"), "autoencoder": folder_hashes(autoencoder, "vae")}
        unit_key = build.unit_key(
            {"settings": identity(model).content, **made_with} | ({"data": others} if others else {})
        )
        unit = build.find_unit(unit_key)
        if unit is None:
            unit = _make(build, unit_key, model, unet, autoencoder, report, execution)
        for name in ("grid.png", "pairs.png"):
            if any(entry.name == name for entry in unit.files):
                report.figure(name, store.read_bytes(unit.path(name)))
        report.metrics({name: value for name, value in unit.info.items() if isinstance(value, float)})
        artifact = build.publish([unit], info=unit.info)
        store.delete(_work(build, unit_key))
        return artifact


def shots_of(sampling: Sampling) -> list[Shot]:
    """The pictures to make, in the order of the grid.

    The first picture of prompt *k* has seed `sampling.seed` + *k*, as `ldm sample` gives it.
    """
    from pipelines.evaluate.generate import Shot

    prompts = sampling.prompts
    rounds = SEEDS_PER_PROMPT if len(prompts) < FEW_PROMPTS else 1
    return [
        Shot(prompt, sampling.seed + number + turn * len(prompts))
        for number, prompt in enumerate(prompts)
        for turn in range(rounds)
    ]


def folder_hashes(unit: Unit, folder: str) -> dict[str, str]:
    """sha256 of each file of the unit under `folder`, by name."""
    return {entry.name: entry.sha256 for entry in unit.files if entry.name.startswith(f"{folder}/")}


def _work(build: Build, unit_key: str) -> str:
    """Folder in the store of what is only needed until the unit is published."""
    return f"{build.stage}/unfinished/{unit_key}"


def _make(
    build: Build,
    unit_key: str,
    model: TextToImageModel,
    unet: Unit,
    autoencoder: Unit,
    report: Report,
    execution: Execution,
) -> Unit:
    from pipelines.actors import actor_pool
    from pipelines.evaluate.generate import GenerateJob, Generator

    shots = shots_of(model.sampling)
    job = GenerateJob(build.store, unet, autoencoder, model)
    measurement = _measurement(build, unit_key, job, report)
    if measurement is None:
        report.progress(0, len(shots), "images", "loading")
        with actor_pool(Generator, job, workers=1, device=execution.device) as pool:
            images = _samples(pool, shots, report, len(shots))
        return _publish(build, unit_key, images, model.sampling, unet)
    from pipelines.evaluate.worker import Measurer

    total = len(shots) + measurement.num_images
    report.progress(0, total, "images", "loading")
    with actor_pool(Measurer, measurement.job, workers=execution.evaluate_workers, device=execution.device) as pool:
        images = _samples(pool, shots, report, total)
        result = measurement.run(pool, report, done=len(shots), total=total)
    return _publish(build, unit_key, images, model.sampling, unet, measurement, result)


def _measurement(build: Build, unit_key: str, job: GenerateJob, report: Report) -> Measurement | None:
    """None if the recipe asks for no figures, or there is nothing to take them from."""
    spec = job.model.evaluate
    if spec is None:
        return None
    from pipelines.evaluate.measure import Measurement
    from pipelines.evaluate.pairs import choose_pairs
    from pipelines.evaluate.worker import MeasureJob

    acquire, select = build.inputs["acquire"], build.inputs["select"]
    comparison = choose_pairs(acquire, select, build.store, spec)
    count = len(comparison.described)
    if count < MIN_IMAGES:
        report.note(f"{build.stage}: no figures, the train split has too few images to compare pictures with")
        return None
    if count < spec.images:
        report.note(
            f"{build.stage}: {count:,} pictures are measured, not {spec.images:,}: the train split has"
            f" {comparison.num_train:,} images, and is compared with itself too"
        )
    trained_judge = build.inputs.get(f"train.{spec.judge}")
    judge = spec.judge if trained_judge is None else trained_judge.units[0]
    measure_job = MeasureJob(
        **{field.name: getattr(job, field.name) for field in fields(job)},
        acquire=acquire,
        select=select,
        extractor=spec.extractor,
        judge=judge,
    )
    return Measurement(measure_job, _work(build, unit_key), comparison, spec, build.inputs.get("score"))


def _samples(pool: Pool, shots: Sequence[Shot], report: Report, total: int) -> Tensor:
    import numpy as np
    import torch

    batches = [shots[first : first + BATCH_SIZE] for first in range(0, len(shots), BATCH_SIZE)]
    made = {}
    for number, images in pool.map("generate", list(enumerate(batches))):
        made[number] = images
        report.progress(sum(map(len, made.values())), total, "images")
    # Joined by a copy: what comes from other processes can't be written to, which torch warns of.
    return torch.from_numpy(np.concatenate([made[number] for number in range(len(batches))]))


def _facts(sampling: Sampling, unet: Unit) -> dict[str, Any]:
    """What all pictures have in common."""
    (weights,) = (sha256 for name, sha256 in folder_hashes(unet, "unet").items() if name.endswith(".safetensors"))
    return {
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "unet_sha256": weights,
    }


def _publish(
    build: Build,
    unit_key: str,
    images: Tensor,
    sampling: Sampling,
    unet: Unit,
    measurement: Measurement | None = None,
    result: Result | None = None,
) -> Unit:
    from pipelines.evaluate.pictures import describe, write_pairs, write_samples

    shots, facts = shots_of(sampling), _facts(sampling, unet)
    columns = SEEDS_PER_PROMPT if len(shots) > len(sampling.prompts) else GRID_COLUMNS
    count, info, shown = len(shots), {}, []
    with tempfile.TemporaryDirectory() as folder:
        files = write_samples(Path(folder), images, shots, columns, facts)
        if measurement is not None and result is not None:
            count += result.num_pictures
            info = {**result.facts, **result.figures}
            shown = measurement.shown_pairs
            files |= write_pairs(Path(folder), measurement.shown_images(result), facts)
            files["metrics.json"] = _json({**facts, **result.facts, "figures": dict(result.figures)})
        files["samples.json"] = describe(shots, shown, facts)
        return publish_unit(build.store, build.stage, unit_key, files, Counts(count, count), info)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
