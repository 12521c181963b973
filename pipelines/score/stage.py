"""Node `score`: a column per scorer for each kept pair. A unit for each scorer of each shard of `acquire`, so that
another scorer computes its own column alone; nothing is dropped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from infra.storage import Store
from ldm.errors import FolderError
from pipelines.artifacts import Artifact, Counts, Identity, Unit, digest, file_sha256
from pipelines.building import Build, find_or_build
from pipelines.dataset.acquired import Shards, acquired_of
from pipelines.dataset.figures import FIGURES, Figure, metrics_of, records
from pipelines.dataset.scores import Identity as ScorerIdentity
from pipelines.dataset.scores import load_scores, score_columns
from pipelines.recipe import NAME_PATTERN, Execution, ScoreSpec
from pipelines.recipe.registered import extractor_key, plugins_used, put_key, scorer_key, weights_sha256
from pipelines.recipe.scorers import columns_by_name
from pipelines.reporting import Report

if TYPE_CHECKING:
    from pipelines.actors import Pool
    from pipelines.dataset.earlier import KnownUnits
    from pipelines.score.values import Part
    from pipelines.score.worker import ScoreTask

FORMAT_VERSION = 2
HUB = "hub:"
FEATURES = "score.features"
NSFW = "nsfw"
LIKELY_NSFW = 0.5


def identity(spec: ScoreSpec) -> Identity:
    """All of the recipe that affects the scores. A local CLIP, and an extractor's weights, count by their content,
    wherever they lie; what a plugin registered counts with the plugin's hash.

    Raises `ldm.errors.FolderError` if they aren't there.
    """
    known, settings = spec.content(), spec.model_dump(mode="json")
    if spec.clip is not None and not spec.clip.startswith(HUB) and not NAME_PATTERN.fullmatch(spec.clip):
        known["clip"] = {"files": _folder_digest(Path(spec.clip))}
    if spec.features is not None:
        put_key(known, settings, "features", spec.features, extractor_key(spec.features, FEATURES))
    if spec.scorers:
        known["scorers"] = _scorer_keys(spec)
        settings["scorers"] = {name: {**options, **known["scorers"][name]} for name, options in spec.scorers.items()}
    return Identity(known, settings)


def _scorer_keys(spec: ScoreSpec) -> dict[str, Any]:
    return {name: scorer_key(name, options) for name, options in spec.scorers.items()}


def score(
    spec: ScoreSpec, inputs: Mapping[str, Artifact], store: Store, report: Report, execution: Execution
) -> Artifact:
    """Score every pair that `acquire` kept. Ray is initialised if there is something to score.

    Raises:
        pipelines.score.errors.ScoreError: a scorer is not installed, or says NaN or infinity.
        pipelines.dataset.errors.UnusableImage: a kept image is missing or damaged.
        ldm.errors.LdmError: the CLIP or the feature extractor can't be loaded.
        infra.locks.Locked: another run is at it.
    """
    build = partial(_build, spec=spec, report=report, execution=execution)
    how = execution.model_dump(mode="json")
    return find_or_build(store, "score", identity(spec), inputs, how, FORMAT_VERSION, build)


def _build(build: Build, spec: ScoreSpec, report: Report, execution: Execution) -> Artifact:
    from pipelines.actors import actor_pool, make_units
    from pipelines.dataset.earlier import KnownUnits
    from pipelines.score.worker import ScoreJob, ShardScorer

    trained = build.inputs.get(f"train.{spec.clip}")
    job = ScoreJob(
        build.store,
        build.stage,
        spec,
        trained.units[0] if trained is not None else None,
        keys=_scorer_keys(spec),
        features_sha256=None if spec.features is None else weights_sha256(spec.features, FEATURES),
        plugins=plugins_used(extractors=[spec.features], scorers=spec.scorers),
    )
    acquired = acquired_of(build.inputs)
    total = acquired.counts.kept
    report.progress(0, total, "images", "loading")
    workers = min(execution.score_workers, len(acquired.units))
    with actor_pool(ShardScorer, job, workers=workers, device=execution.device) as pool:
        scorers = pool.call("identities")
        tasks = _tasks(build, acquired, scorers)
        parts = [part for task in tasks for part in task.parts]
        known = KnownUnits(build.store, build.stage, {part.made_with for part in parts}, build.again)
        found = {part.unit_key: unit for part in parts if (unit := known.find(part.unit_key)) is not None}
        missing = [replace(task, parts=[part for part in task.parts if part.unit_key not in found]) for task in tasks]
        missing = _with_earlier_rows(build, [task for task in missing if task.parts], known, pool, but=parts)
        found |= make_units(build, missing, pool, "score", report, total=total)
    units = [found[part.unit_key] for part in parts]
    told = figures(units, build.store)
    report.metrics(metrics_of(told))
    return build.publish(units, counts=Counts(total, total), info={"scorers": scorers, FIGURES: records(told)})


def _tasks(build: Build, acquired: Shards, scorers: Mapping[str, ScorerIdentity]) -> list[ScoreTask]:
    """All parts of each shard.

    A part is known by the shard's digest, which holds more than a scorer sees: to know keys, no ledger is read. Rows of
    which a scorer sees the same as before are copied.
    """
    from pipelines.score.values import Part
    from pipelines.score.worker import ScoreTask

    made_with = {name: {"scorer": name, "scored_with": identity} for name, identity in scorers.items()}
    tasks = []
    for source in acquired.units:
        parts = []
        for name, values in made_with.items():
            content = build.base_key({**values, "source": source.digest})
            of_rows = digest({"format": build.format_version, **values})
            parts.append(Part(name, scorers[name], of_rows, content, build.current(content)))
        tasks.append(ScoreTask(source, parts))
    return tasks


def _with_earlier_rows(
    build: Build, missing: Sequence[ScoreTask], known: KnownUnits, pool: Pool, but: Sequence[Part]
) -> list[ScoreTask]:
    """The tasks, whose parts say now what they have in common with earlier units other than those of `but`."""
    from pipelines.dataset.earlier import copied_rows

    in_use = {part.unit_key for part in but}
    made_with = {part.made_with for task in missing for part in task.parts}
    earlier = {name: units for name in made_with if (units := known.earlier(name, in_use))}
    if not earlier:
        return list(missing)
    inputs = dict(pool.map("inputs", list(enumerate(missing))))
    parts = [list(task.parts) for task in missing]
    for name, units in earlier.items():
        places = [(row, at) for row, own in enumerate(parts) for at, part in enumerate(own) if part.made_with == name]
        copied = copied_rows(build.store, [inputs[row][at] for row, at in places], units)
        for (row, at), own in zip(places, copied, strict=True):
            parts[row][at] = replace(parts[row][at], copied=own)
    return [replace(task, parts=own) for task, own in zip(missing, parts, strict=True)]


@dataclass(frozen=True)
class _Scored:
    """Units that are there, before an artifact lists them."""

    units: Sequence[Unit]


def figures(units: Sequence[Unit], store: Store) -> list[Figure]:
    """What the scores are like over all pairs: mean and percentiles of each column that is told; empty where there are
    none."""
    scored = _Scored(units)
    there, known = score_columns(scored, store), columns_by_name()
    names = [name for name, (_, column) in known.items() if column.told and name in there]
    if not names or not sum(unit.counts.kept for unit in units):
        return []
    table, found = load_scores(scored, store, names), []
    for name in names:
        values = table.column(name).to_numpy().astype(np.float64)
        told = {f"mean_{name}": values.mean()} | {f"p{q:02d}_{name}": np.percentile(values, q) for q in (5, 50, 95)}
        if name == NSFW:
            told["share_likely_nsfw"] = (values > LIKELY_NSFW).mean()
        found += [Figure(title, "acquired", float(value), count=len(values)) for title, value in told.items()]
    return found


def _folder_digest(folder: Path) -> str:
    if not folder.is_dir():
        raise FolderError(f'score.clip: {folder} is no folder; give one that open_clip loads, or "hub:NAME/TAG"')
    return digest({path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()})
