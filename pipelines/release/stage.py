"""Node `release`: a trained model as a folder that stock diffusers pipelines load, with a card made from manifests.

The unit's folder is the model folder. MLflow's registry learns of it through the report: facts and location, no bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from infra.registry import ModelFacts
from infra.storage import Store
from infra.tracking_models import DatasetFacts
from pipelines.artifacts import Artifact, Counts, Identity, Unit, digest, file_sha256, revisions
from pipelines.building import Build, find_or_build
from pipelines.dataset.acquired import is_acquired
from pipelines.dataset.figures import KERNEL_DISTANCE, figures_of, is_number, metrics_of
from pipelines.errors import LatentworksError
from pipelines.publishing import publish_unit
from pipelines.recipe import Execution, ReleaseSpec, TextToImageModel
from pipelines.recipe.networks import reading
from pipelines.release.card import ancestors, write_card
from pipelines.reporting import Report, Scalar

if TYPE_CHECKING:
    from ldm.generate import LatentDiffusion

FORMAT_VERSION = 2
NODE = "release"
NEEDS_CLUSTER = False
CARD = "README.md"
GRID = "grid.png"
CHECK_PROMPT = "a red apple"


class ReleaseError(LatentworksError):
    """The exported folder is not the model that was to be exported; nothing is published."""


def identity(spec: ReleaseSpec, model: TextToImageModel) -> Identity:
    """All of the recipe that affects the folder, apart from what the weights were made with."""
    content = spec.content() | {"text": model.text.content(), "diffusion": model.diffusion.content()}
    return Identity(
        content, spec.model_dump(mode="json") | model.model_dump(mode="json", include={"text", "diffusion"})
    )


def release(
    spec: ReleaseSpec,
    model: TextToImageModel,
    inputs: Mapping[str, Artifact],
    store: Store,
    report: Report,
    execution: Execution,
) -> Artifact:
    """Export the model. One unit, whose files are those of the model folder.

    Raises:
        ldm.errors.LdmError: a part can't be loaded or saved.
        ReleaseError: the folder, loaded again, is not the same model.
        infra.locks.Locked: another run is at it.
    """
    build = partial(_build, spec=spec, model=model, report=report)
    how = execution.model_dump(mode="json")
    return find_or_build(store, NODE, identity(spec, model), inputs, how, FORMAT_VERSION, build)


def _build(build: Build, spec: ReleaseSpec, model: TextToImageModel, report: Report) -> Artifact:
    unit_key = build.unit_key({"settings": build.identity.content, "inputs": revisions(build.inputs)})
    unit = build.find_unit(unit_key) or _make(build, unit_key, spec, model, report)
    # Before it is published: a run killed in between tells it again, and once too often is harmless.
    report.model(facts_of(spec, build, unit))
    return build.publish([unit], info=unit.info)


def facts_of(spec: ReleaseSpec, build: Build, unit: Unit) -> ModelFacts:
    """What the registry is told: lineage as revisions, figures as `evaluate` measured them.

    The recipe's digest is over the settings of every node that the model was made by. Raises `ArtifactError` if a
    manifest is missing.
    """
    store, nodes = build.store, ancestors(build.inputs, build.store)
    settings = {name: artifact.manifest["spec"] for name, artifact in nodes.items()}
    params: dict[str, Scalar] = {"model": spec.model, "recipe_digest": digest(settings)}
    params |= {f"revision.{name}": artifact.revision for name, artifact in sorted(nodes.items())}
    (evaluated,) = nodes[f"evaluate.{spec.model}"].units
    params |= {f"evaluate.{name}": value for name, value in evaluated.info.items() if is_number(value)}
    figures = figures_of(evaluated)
    return ModelFacts(
        revision=digest([unit.digest]),
        location=store.location(f"{NODE}/units/{unit.key}"),
        model_hash=unit.info["model_hash"],
        datasets=tuple(
            DatasetFacts(name, nodes[name].revision, store.location(nodes[name].path))
            for name in ("select", *filter(is_acquired, nodes))
            if name in nodes
        ),
        params=params,
        metrics=metrics_of(figures),
        decided_by=next((figure.label for figure in figures if figure.name == KERNEL_DISTANCE), None),
    )


def _make(build: Build, unit_key: str, spec: ReleaseSpec, model: TextToImageModel, report: Report) -> Unit:
    from ldm.interchange import load_model, model_hash, save_model
    from pipelines.dataset.models import load_trained

    store = build.store
    steps = ("loading", "saving", "checking", "publishing")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        report.progress(0, len(steps), "steps", steps[0])
        (unet,) = build.inputs[f"train.{spec.model}"].units
        (autoencoder,) = build.inputs[f"train.{model.first_stage}"].units
        trained = load_trained(store, unet, autoencoder, *reading(model))
        report.progress(1, len(steps), "steps", steps[1])
        save_model(trained, folder)
        report.progress(2, len(steps), "steps", steps[2])
        check_same(trained, load_model(folder), folder)
        card = write_card(spec.model, build.inputs, store)
        (folder / CARD).write_text(card, encoding="utf-8")
        (pictures,) = build.inputs[f"evaluate.{spec.model}"].units
        (folder / GRID).write_bytes(store.read_bytes(pictures.path(GRID)))
        report.document(CARD, card)
        report.progress(3, len(steps), "steps", steps[3])
        files: dict[str, Path | bytes] = {
            path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
        }
        info = {"model_hash": model_hash(folder), "content": _content(build, files)}
        unit = publish_unit(store, NODE, unit_key, files, Counts(1, 1), info)
    report.progress(len(steps), len(steps), "steps")
    return unit


def _content(build: Build, files: Mapping[str, Path | bytes]) -> str:
    """What the unit is known by: all but the card, which tells times, and the revisions that the card is about."""
    hashes = {name: file_sha256(path) for name, path in files.items() if name != CARD and isinstance(path, Path)}
    return digest([hashes, {name: artifact.revision for name, artifact in build.inputs.items()}])


def check_same(expected: LatentDiffusion, found: LatentDiffusion, folder: Path) -> None:
    """Raises `ReleaseError` unless both models have equal weights and settings, and read a prompt alike."""
    import torch

    differing = []
    for name in ("unet", "autoencoder"):
        ours, theirs = (getattr(model, name) for model in (expected, found))
        weights, others = ours.state_dict(), theirs.state_dict()
        same = weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)
        if not same or ours.config != theirs.config:
            differing.append(name)
    contexts = [model.text_encoder.encode([CHECK_PROMPT]).context for model in (expected, found)]
    if contexts[0].shape != contexts[1].shape or not torch.equal(*contexts):
        differing.append("text_encoder")
    if expected.diffusion.config.prediction != found.diffusion.config.prediction:
        differing.append("scheduler")
    if differing:
        raise ReleaseError(
            f"{', '.join(differing)} of {folder} came back otherwise than saved; this is a defect, please report it"
        )
