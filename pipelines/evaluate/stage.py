"""Node `evaluate.<model>`: pictures of the recipe's prompts by the averaged weights, singly and as one grid.

If the recipe asks for it, pictures of the data's own captions are measured as well: see `measure` and `figures`. What
earlier evaluations know of the same pictures and images is taken over.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts, Identity, Unit
from pipelines.building import Build, find_or_build
from pipelines.dataset.acquired import acquired_of
from pipelines.dataset.figures import FIGURES, finite, records
from pipelines.publishing import publish_unit
from pipelines.recipe import EvaluateSpec, Execution, Sampling, TextToImageModel
from pipelines.recipe.registered import extractor_key, plugins_used, put_key, sampler_key
from pipelines.reporting import Report

if TYPE_CHECKING:
    from pipelines.evaluate.generate import Shot
    from pipelines.evaluate.known import Known
    from pipelines.evaluate.measure import Measurement
    from pipelines.evaluate.pairs import Comparison
    from pipelines.evaluate.parts import Part
    from pipelines.evaluate.worker import MeasureJob

FORMAT_VERSION = 2
FEW_PROMPTS = 16
"""Number of prompts up to which each gets a picture from each of `SEEDS_PER_PROMPT` seeds: a row of the grid. More get
one each."""
SEEDS_PER_PROMPT = 2
GRID_COLUMNS = 8
WEIGHTS = ".safetensors"
EXTRACTOR = "evaluate.extractor"
MIN_IMAGES = 2
"""Fewest images on either side of a comparison: there is no covariance of fewer."""


def identity(model: TextToImageModel) -> Identity:
    """All of the recipe that affects pictures and figures, apart from what the weights were made with. An extractor's
    weights count by their content; what a plugin registered counts with the plugin's hash.

    Raises `ldm.errors.FolderError` if the extractor's weights can't be read.
    """
    known = {name: getattr(model, name).content() for name in ("text", "diffusion", "sampling")}
    settings = model.model_dump(mode="json", include={"text", "diffusion", "sampling", "evaluate"})
    sampler = model.sampling.sampler
    put_key(known["sampling"], settings["sampling"], "sampler", sampler, sampler_key(sampler))
    if model.evaluate is not None:
        known["evaluate"] = model.evaluate.content()
        extractor = model.evaluate.extractor
        put_key(known["evaluate"], settings["evaluate"], "extractor", extractor, extractor_key(extractor, EXTRACTOR))
        if model.evaluate.untrained:
            known["initial"] = {"network": model.network.content(), "seed": model.train.seed}
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
        ldm.errors.LdmError: the model can't be loaded, or makes NaN; extractor or judge are missing.
        pipelines.dataset.errors.UnusableImage: a real image can't be decoded.
        infra.locks.Locked: another run is at it.
    """
    build = partial(_build, model_name=model_name, model=model, report=report, execution=execution)
    how = execution.model_dump(mode="json")
    return find_or_build(store, f"evaluate.{model_name}", identity(model), inputs, how, FORMAT_VERSION, build)


def _build(build: Build, model_name: str, model: TextToImageModel, report: Report, execution: Execution) -> Artifact:
    from pipelines.evaluate.parts import folder_hashes

    inputs = build.inputs
    (unet,) = inputs[f"train.{model_name}"].units
    (autoencoder,) = inputs[f"train.{model.first_stage}"].units
    others = {name: inputs[name].revision for name in inputs if name not in (unet.stage, autoencoder.stage)}
    made_with = {"unet": folder_hashes(unet, "unet"), "autoencoder": folder_hashes(autoencoder, "vae")}
    unit_key = build.unit_key({"settings": build.identity.content, **made_with} | ({"data": others} if others else {}))
    unit = build.find_unit(unit_key)
    if unit is None:
        unit = _make(build, unit_key, model, (unet, autoencoder), report, execution)
    for name in ("grid.png", "pairs.png"):
        if unit.has(name):
            report.figure(name, build.store.read_bytes(unit.path(name)))
    artifact = build.publish([unit], info=unit.info)
    build.store.delete(_work(build, unit_key))
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


def _work(build: Build, unit_key: str) -> str:
    """Folder in the store of what is only needed until the unit is published."""
    return f"{build.stage}/unfinished/{unit_key}"


def _make(
    build: Build,
    unit_key: str,
    model: TextToImageModel,
    networks: tuple[Unit, Unit],
    report: Report,
    execution: Execution,
) -> Unit:
    from pipelines.actors import actor_pool
    from pipelines.evaluate.known import Known
    from pipelines.evaluate.measure import Measurement, make_rows, size_px_of
    from pipelines.evaluate.parts import column_keys, sample_part
    from pipelines.evaluate.worker import MeasureJob, Measurer

    plugins = plugins_used(
        samplers=[model.sampling.sampler], extractors=[] if model.evaluate is None else [model.evaluate.extractor]
    )
    job, measurement = MeasureJob(build.store, *networks, model, plugins), None
    parts = {"samples": sample_part(shots_of(model.sampling))}
    comparison = _comparison(build, model, report)
    if comparison is not None and model.evaluate is not None:
        job = _measuring(job, build, model.evaluate)
        measurement = Measurement(job, comparison, model.evaluate, build.inputs.get("score"))
        parts |= measurement.parts
    workers = execution.evaluate_workers
    report.progress(0, workers, "workers", "loading")
    with actor_pool(Measurer, job, workers=workers, device=execution.device) as pool:
        identities = pool.call("identities")
        report.progress(workers, workers, "workers")
        keys = column_keys(job, identities, size_px_of(job))
        known = Known(build.store, _work(build, unit_key))
        if build.again is None or build.again.why != "force":
            _take_over(build, list(parts.values()), keys, known, report)
        make_rows(list(parts.values()), keys, known, pool, report)
    return _publish(build, unit_key, job, known, keys, measurement, identities, report)


def _comparison(build: Build, model: TextToImageModel, report: Report) -> Comparison | None:
    """None if the recipe asks for no figures, or there is nothing to take them from."""
    spec = model.evaluate
    if spec is None:
        return None
    from pipelines.evaluate.pairs import choose_pairs

    comparison = choose_pairs(acquired_of(build.inputs), build.inputs["select"], build.store, spec)
    count = len(comparison.described)
    if count < MIN_IMAGES:
        report.note(f"{build.stage}: no figures, the train split has too few images to compare pictures with")
        return None
    if count < spec.images:
        report.note(
            f"{build.stage}: {count:,} pictures are measured, not {spec.images:,}: the train split has"
            f" {comparison.num_train:,} images, and is compared with itself too"
        )
    return comparison


def _measuring(job: MeasureJob, build: Build, spec: EvaluateSpec) -> MeasureJob:
    from pipelines.evaluate.worker import Figures

    trained = build.inputs.get(f"train.{spec.judge}")
    judge = spec.judge if trained is None else trained.units[0]
    figures = Figures(
        acquired_of(build.inputs),
        build.inputs["select"],
        spec.extractor,
        judge,
        extractor_key(spec.extractor, EXTRACTOR),
    )
    return replace(job, figures=figures)


def _take_over(build: Build, parts: Sequence[Part], keys: Mapping[str, str], known: Known, report: Report) -> None:
    """Learn what earlier evaluations hold, and say how much that saves."""
    from pipelines.evaluate.measure import count_known

    before, _ = count_known(parts, keys, known)
    pictures = {row for part in parts if part.subject == "trained" for row in part.rows.tolist()}
    known.take_over(build.stage, frozenset(keys.values()), pictures)
    after, lacking_judgement = count_known(parts, keys, known)
    total = sum(len(part.rows) for part in parts if part.is_seen)
    if after > before:
        report.note(f"{build.stage}: {after - before:,} of {total:,} pictures and images are known from an earlier one")
    if lacking_judgement:
        report.note(
            f"{build.stage}: {lacking_judgement:,} pictures and images whose features are known are made and looked at"
            " again, for the judge: features are kept, and pictures aren't"
        )


def _publish(
    build: Build,
    unit_key: str,
    job: MeasureJob,
    known: Known,
    keys: Mapping[str, str],
    measurement: Measurement | None,
    identities: Mapping[str, str],
    report: Report,
) -> Unit:
    import torch

    from pipelines.evaluate.known import FEATURES, PICTURES
    from pipelines.evaluate.parts import sample_part
    from pipelines.evaluate.pictures import describe, write_pairs, write_samples

    sampling = job.model.sampling
    shots, facts = shots_of(sampling), _facts(sampling, job.unet)
    images = torch.from_numpy(known.values(keys[PICTURES], sample_part(shots).rows))
    columns = SEEDS_PER_PROMPT if len(shots) > len(sampling.prompts) else GRID_COLUMNS
    count, shown = len(shots), []
    info: dict[str, Any] = {"columns": {PICTURES: keys[PICTURES]}, FIGURES: []}
    with tempfile.TemporaryDirectory() as folder:
        files = write_samples(Path(folder), images, shots, columns, facts)
        if measurement is not None:
            count += measurement.num_pictures
            result = measurement.result(keys, known, identities)
            figures, left_out = finite(result.figures)
            if left_out:
                report.note(f"{build.stage}: left out, since they are not finite: {', '.join(left_out)}")
            told = {**result.facts, FIGURES: records(figures)}
            info = {"columns": dict(keys), **told}
            shown = measurement.shown_pairs
            files |= write_pairs(Path(folder), measurement.shown_images(keys, known), facts)
            files["metrics.json"] = _json({**facts, **told})
            files[FEATURES] = measurement.features_file(keys, known)
        files["samples.json"] = describe(shots, shown, facts)
        return publish_unit(build.store, build.stage, unit_key, files, Counts(count, count), info)


def _facts(sampling: Sampling, unet: Unit) -> dict[str, Any]:
    """What all pictures have in common."""
    (weights,) = (
        entry.sha256 for entry in unet.files if entry.name.startswith("unet/") and entry.name.endswith(WEIGHTS)
    )
    return {
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "unet_sha256": weights,
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
