"""Stage `train`: a model from its inputs, as one unit that its rank 0 publishes.

Checkpoints lie in the store until the unit does: to resume, run the same command again. The last one stays, so that a
longer training can go on from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from infra.storage import Store
from pipelines.artifacts import Artifact, ArtifactError, Identity, revisions
from pipelines.building import Build, find_or_build
from pipelines.recipe import Execution, Model
from pipelines.recipe.kinds import KINDS
from pipelines.recipe.plugins import Plugin
from pipelines.recipe.registered import plugins_used
from pipelines.reporting import Report
from pipelines.train import kinds
from pipelines.train.continuation import keep_last_checkpoint, lineage
from pipelines.train.job import TrainJob

FORMAT_VERSION = 1


def identity(model: Model) -> Identity:
    """What of the recipe affects the weights: not how previews are sampled, how the model is measured, nor in what
    batches the cache was made. Initial weights count by their content."""
    kind = kinds.KINDS[model.kind]
    initial = dict(kind.begins_with(model))
    settings = model.model_dump(mode="json", exclude=set(kind.elsewhere))
    return Identity(model.content(exclude=kind.elsewhere) | initial, settings | initial)


def train(
    model_name: str,
    model: Model,
    inputs: Mapping[str, Artifact],
    store: Store,
    report: Report,
    execution: Execution,
) -> Artifact:
    """The trained model. Ray is initialised if there is something to train.

    Raises:
        pipelines.train.errors.TrainError: it can't be trained, or its processes failed again and again.
        pipelines.dataset.errors.DatasetError: the cache is damaged, or was made with something else.
        infra.locks.Locked: another run is training it.
    """
    build = partial(_build, model_name=model_name, model=model, report=report, execution=execution)
    how = execution.model_dump(mode="json")
    return find_or_build(store, f"train.{model_name}", identity(model), inputs, how, FORMAT_VERSION, build)


def _build(build: Build, model_name: str, model: Model, report: Report, execution: Execution) -> Artifact:
    job = make_job(build, model_name, model, execution)
    if build.find_unit(job.unit_key) is None:
        from pipelines.train.launch import launch

        launch(job, report)
    return publish(build, job)


def make_job(build: Build, model_name: str, model: Model, execution: Execution) -> TrainJob:
    content = build.identity.content
    return TrainJob(
        name=model_name,
        model=model,
        inputs=dict(build.inputs),
        store=build.store,
        execution=execution,
        unit_key=build.unit_key({"spec": content, "inputs": revisions(build.inputs)}),
        lineage=lineage(content, build.inputs, FORMAT_VERSION),
        from_nothing=build.again is not None and build.again.why == "force",
        plugins=plugins_of_previews(model, execution),
    )


def plugins_of_previews(model: Model, execution: Execution) -> tuple[Plugin, ...]:
    """The plugins that registered names which previews are made or measured with."""
    sampling = KINDS[model.kind].sampling(model)
    samplers = [] if sampling is None else [sampling.sampler]
    return plugins_used(samplers=samplers, extractors=[execution.extractor])


def publish(build: Build, job: TrainJob) -> Artifact:
    """The artifact of the unit that rank 0 has published; of its checkpoints the last one stays."""
    unit = build.find_unit(job.unit_key)
    if unit is None:
        raise ArtifactError(f"training {job.name} ended without publishing unit {job.unit_key}; run the command again")
    keep_last_checkpoint(job)
    job.store.delete(job.launcher)
    return build.publish([unit], info=dict(unit.info))
