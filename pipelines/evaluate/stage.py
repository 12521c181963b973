"""Node `evaluate.<model>`: pictures of the recipe's prompts by the averaged weights, singly and as one grid."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.storage import Store
from pipelines.artifacts import Artifact, Build, Counts, Unit, building, finished, publish_unit
from pipelines.recipe import Execution, Sampling, TextToImageModel
from pipelines.report import Report

if TYPE_CHECKING:
    from torch import Tensor

    from pipelines.evaluate.generate import Shot

FORMAT_VERSION = 1
BATCH_SIZE = 16
FEW_PROMPTS = 16
"""Up to so many prompts get a picture from each of `SEEDS_PER_PROMPT` seeds: a row of the grid. More get one each."""
SEEDS_PER_PROMPT = 2
GRID_COLUMNS = 8


def identity(model: TextToImageModel) -> dict[str, Any]:
    """All of the recipe that affects the pictures, apart from what the weights were made with."""
    return model.model_dump(mode="json", include={"text", "diffusion", "sampling"})


def evaluate(
    model_name: str,
    model: TextToImageModel,
    inputs: Mapping[str, Artifact],
    store: Store,
    report: Report,
    execution: Execution,
) -> Artifact:
    """Sample from the trained model. Ray is initialised if there is something to sample.

    Raises:
        ldm.errors.LdmError: the model can't be loaded, or makes no numbers.
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
        made_with = {"unet": folder_hashes(unet, "unet"), "autoencoder": folder_hashes(autoencoder, "vae")}
        unit_key = build.unit_key({"settings": identity(model), **made_with})
        unit = build.find_unit(unit_key)
        if unit is None:
            unit = _make(build, unit_key, model, unet, autoencoder, report, execution)
        report.figure("grid.png", store.read_bytes(unit.path("grid.png")))
        return build.publish([unit], info=unit.info)


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


def _make(
    build: Build,
    unit_key: str,
    model: TextToImageModel,
    unet: Unit,
    autoencoder: Unit,
    report: Report,
    execution: Execution,
) -> Unit:
    import torch

    from pipelines.actors import actor_pool
    from pipelines.evaluate.generate import GenerateJob, Generator

    shots = shots_of(model.sampling)
    batches = [shots[first : first + BATCH_SIZE] for first in range(0, len(shots), BATCH_SIZE)]
    job = GenerateJob(build.store, unet, autoencoder, model)
    report.progress(0, len(shots), "images", "loading")
    made: dict[int, Tensor] = {}
    with actor_pool(Generator, job, workers=1, device=execution.device) as pool:
        for number, images in pool.map("generate", list(enumerate(batches))):
            made[number] = torch.from_numpy(images)
            report.progress(sum(map(len, made.values())), len(shots), "images")
    images = torch.cat([made[number] for number in range(len(batches))])
    with tempfile.TemporaryDirectory() as folder:
        columns = SEEDS_PER_PROMPT if len(shots) > len(model.sampling.prompts) else GRID_COLUMNS
        files = _write(Path(folder), images, shots, columns, _facts(model.sampling, unet))
        return publish_unit(build.store, build.stage, unit_key, files, Counts(len(shots), len(shots)))


def _facts(sampling: Sampling, unet: Unit) -> dict[str, Any]:
    """What all pictures have in common."""
    (weights,) = (sha256 for name, sha256 in folder_hashes(unet, "unet").items() if name.endswith(".safetensors"))
    return {
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "guidance_scale": sampling.guidance_scale,
        "unet_sha256": weights,
    }


def _write(
    folder: Path, images: Tensor, shots: list[Shot], columns: int, facts: dict[str, Any]
) -> dict[str, Path | bytes]:
    from ldm.images import image_grid, save_png

    files: dict[str, Path | bytes] = {}
    samples = []
    for number, (image, shot) in enumerate(zip(images, shots, strict=True)):
        own = {"prompt": shot.prompt, "seed": shot.seed}
        name = f"images/{number:05d}.png"
        files[name] = folder / f"{number:05d}.png"
        save_png(image, folder / f"{number:05d}.png", facts | own)
        samples.append({"file": name, **own})
    files["grid.png"] = folder / "grid.png"
    save_png(image_grid(images, columns), folder / "grid.png", facts)
    files["samples.json"] = (json.dumps({**facts, "samples": samples}, indent=2, ensure_ascii=False) + "\n").encode()
    return files
