"""Node `score`: a column per scorer for each kept pair. One unit a shard of `acquire`; nothing is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from infra.storage import Store
from ldm.errors import FolderError
from pipelines.artifacts import Artifact, Identity, digest, file_sha256, finished
from pipelines.building import Build, building
from pipelines.dataset.scores import load_scores, score_columns
from pipelines.recipe import NAME_PATTERN, Execution, ScoreSpec
from pipelines.reporting import Report

FORMAT_VERSION = 1
HUB = "hub:"
LIKELY_NSFW = 0.5


def identity(spec: ScoreSpec) -> Identity:
    """All of the recipe that affects the scores. A local CLIP counts by its content, wherever it lies.

    Raises `ldm.errors.FolderError` if it isn't there.
    """
    known = spec.content()
    if spec.clip is not None and not spec.clip.startswith(HUB) and not NAME_PATTERN.fullmatch(spec.clip):
        known["clip"] = {"files": _folder_digest(Path(spec.clip))}
    return Identity(known, spec.model_dump(mode="json"))


def score(
    spec: ScoreSpec, inputs: Mapping[str, Artifact], store: Store, report: Report, execution: Execution
) -> Artifact:
    """Score every pair that `acquire` kept. Ray is initialised if there is something to score.

    Raises:
        pipelines.score.errors.ScoreError: a scorer is not installed, or says what is not a number.
        pipelines.dataset.errors.UnusableImage: a kept image is missing or damaged.
        ldm.errors.LdmError: the CLIP or the feature extractor can't be loaded.
        infra.locks.Locked: another run is at it.
    """
    found = finished(store, "score", identity(spec), inputs, FORMAT_VERSION)
    if found is not None:
        return found
    how = execution.model_dump(mode="json")
    with building(store, "score", identity(spec), inputs, how, FORMAT_VERSION) as build:
        return _build(build, spec, report, execution)


def _build(build: Build, spec: ScoreSpec, report: Report, execution: Execution) -> Artifact:
    from pipelines.actors import actor_pool, make_units
    from pipelines.score.worker import ScoreJob, ScoreTask, ShardScorer

    trained = build.inputs.get(f"train.{spec.clip}")
    job = ScoreJob(build.store, build.stage, spec, trained.units[0] if trained is not None else None)
    sources = build.inputs["acquire"].units
    report.progress(0, sum(unit.counts.kept for unit in sources), "images", "loading")
    with actor_pool(
        ShardScorer, job, workers=min(execution.score_workers, len(sources)), device=execution.device
    ) as pool:
        scorers = pool.call("identities")
        keys = [build.unit_key({"scored_with": scorers, "source": unit.digest}) for unit in sources]
        tasks = [ScoreTask(unit, key) for unit, key in zip(sources, keys, strict=True)]
        units = make_units(build, tasks, pool, "score", report)
    artifact = build.publish(units, info={"scorers": scorers})
    report.metrics(figures(artifact, build.store))
    return artifact


def figures(scored: Artifact, store: Store) -> dict[str, float]:
    """What the scores are like over all pairs, by name; empty where there are none."""
    names = [name for name in ("clip_similarity", "nsfw") if name in score_columns(scored, store)]
    if not scored.counts.kept or not names:
        return {}
    table = load_scores(scored, store, names)
    found: dict[str, float] = {}
    for name in names:
        values = table.column(name).to_numpy().astype(np.float64)
        found[f"{name}_mean"] = float(values.mean())
        found |= {f"{name}_p{q:02d}": float(np.percentile(values, q)) for q in (5, 50, 95)}
    if "nsfw" in names:
        found["nsfw_likely_share"] = float((values > LIKELY_NSFW).mean())
    return found


def _folder_digest(folder: Path) -> str:
    if not folder.is_dir():
        raise FolderError(f'score.clip: {folder} is no folder; give one that open_clip loads, or "hub:NAME/TAG"')
    return digest({path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.is_file()})
