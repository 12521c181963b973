"""What of a recipe can't be run as it is asked for: batches that don't come out even, addresses that are none."""

from __future__ import annotations

import math
from urllib.parse import urlsplit

from pipelines.recipe import Recipe, TrainSpec
from pipelines.recipe.kinds import KINDS
from pipelines.recipe.places import check_scheme, is_authority, is_host, schemes, too_long
from pipelines.recipe.problems import Findings, listed

RAY_CLIENT = "ray://"
UNWRITABLE = {
    "http": "can be read alone",
    "https": "can be read alone",
    "memory": "is in this process alone, and other processes don't see it",
    "data": "holds what is in it already",
}
"""Stores that take nothing, or nothing that lasts."""
TRACKING = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks", "file")
"""Schemes of MLflow's tracking URIs."""


def check_execution(recipe: Recipe, findings: Findings) -> None:
    for name, model in recipe.models.items():
        _check_training(f"models.{name}.train", model.train, findings)
    _check_batches(recipe, findings)
    _check_lanes_have_pairs(recipe, findings)
    _check_use(recipe, findings)
    _check_cluster(recipe, findings)
    _check_places(recipe, findings)


def _check_training(where: str, train: TrainSpec, findings: Findings) -> None:
    size, lanes = train.global_batch_size, train.lanes
    if size % lanes:
        findings.refuse(
            f"{where}.lanes", f"{lanes} must divide global_batch_size ({size}); give {_divisors(size, most=lanes)}"
        )
    if train.optimizer.warmup_steps > train.steps:
        findings.note(
            f"{where}.optimizer.warmup_steps",
            f"{train.optimizer.warmup_steps} of {train.steps} steps: training ends before its learning rate is reached",
        )


def _check_batches(recipe: Recipe, findings: Findings) -> None:
    """That global batches are cut evenly among ranks, and each rank's share into micro-batches."""
    ranks, micro = recipe.execution.ranks, recipe.execution.micro_batch_size
    sizes = {name: model.train.global_batch_size for name, model in recipe.models.items()}
    uneven = [f"{size} (models.{name})" for name, size in sizes.items() if size % ranks]
    if uneven:
        findings.refuse(
            "execution.ranks",
            f"{ranks} ranks don't divide the global batches of {listed(uneven)}; give a divisor of all, such as"
            f" {_largest_divisor(math.gcd(*sizes.values()), ranks)}, or change train.global_batch_size",
        )
        return
    if micro is None:
        return
    shares = {name: size // ranks for name, size in sizes.items()}
    cut = [f"{share} (models.{name})" for name, share in shares.items() if share % micro]
    if cut:
        findings.refuse(
            "execution.micro_batch_size",
            f"{micro} doesn't divide a rank's shares of the global batches, {listed(cut)}; give a divisor of all, or"
            " leave it out",
        )
    for name, model in recipe.models.items():
        if KINDS[model.kind].compares_batch and micro != shares[name]:
            findings.refuse(
                "execution.micro_batch_size",
                f"{micro} would compare each pair of models.{name}, a {model.kind}, with fewer than its global batch of"
                f" {sizes[name]}; leave it out, or set it to {shares[name]}",
            )


def _check_lanes_have_pairs(recipe: Recipe, findings: Findings) -> None:
    bounds = [(source.where, bound) for source in recipe.named_sources if (bound := source.block.bound()) is not None]
    if not bounds or len(bounds) < len(recipe.named_sources):
        return
    most = sum(bound.pairs for _, bound in bounds)
    told = listed(f"{where}.{bound.key} is {bound.value}" for where, bound in bounds)
    for name, model in recipe.models.items():
        if model.train.lanes > most:
            findings.refuse(
                f"models.{name}.train.lanes",
                f"{model.train.lanes}, but {told}: each lane needs a pair of its own; give fewer lanes, or more pairs",
            )
        evaluation = KINDS[model.kind].evaluation(model)
        if evaluation is not None and evaluation.images > most // 2:
            findings.note(
                f"models.{name}.evaluate.images",
                f"{evaluation.images}, but {told}, and the train split is compared with itself: at most {most // 2} are"
                " made",
            )


def _check_use(recipe: Recipe, findings: Findings) -> None:
    """Models that nothing asks for, though others are there to be made with them."""
    models = {name: (model, KINDS[model.kind]) for name, model in recipe.models.items()}
    used = {other for model, kind in models.values() for other in kind.uses(model)}
    used |= {recipe.score.clip} if recipe.score is not None and recipe.score.clip is not None else set()
    are_parts = all(kind.is_part for _, kind in models.values())
    for name, (model, kind) in models.items():
        if kind.is_part and not are_parts and name not in used:
            findings.note(f"models.{name}", f"nothing uses this {model.kind}; it is trained all the same")
    if recipe.release is not None and recipe.release.model in models:
        released, kind = models[recipe.release.model]
        if kind.is_released and kind.evaluation(released) is None:
            findings.note("release", f"models.{recipe.release.model}.evaluate is null: the model's card has no figures")


def _check_cluster(recipe: Recipe, findings: Findings) -> None:
    execution = recipe.execution
    address = execution.cluster
    if address.startswith(("http://", "https://")):
        findings.refuse(
            "execution.cluster",
            f"{address!r} is an address of Ray Jobs; give host:port (6379 by default), ray://host:10001, or auto",
        )
    elif address not in {"local", "auto"} and not is_authority(address.removeprefix(RAY_CLIENT)):
        findings.refuse(
            "execution.cluster", f"{address!r} is none of local, auto, host:port and ray://host:port; give one of these"
        )
    if execution.cpus is not None and address != "local":
        findings.note("execution.cpus", f"{address!r} has CPUs of its own; this bounds the threads of trainings alone")
    if execution.offload_optimizer and execution.device == "cpu":
        findings.note("execution.offload_optimizer", "has no effect on device cpu: all is in the host's memory")


def _check_places(recipe: Recipe, findings: Findings) -> None:
    if check_scheme("store", recipe.store, findings):
        for scheme in schemes(recipe.store):
            if scheme in UNWRITABLE:
                findings.refuse(
                    "store", f"{recipe.store!r}: {scheme}:// {UNWRITABLE[scheme]}; give a folder, or s3://bucket/prefix"
                )
    if schemes(recipe.state_dir):
        findings.refuse(
            "state_dir", f"{recipe.state_dir!r} is a URL; databases and logs need a folder of this machine: give a path"
        )
    elif recipe.state_dir.startswith("~"):
        findings.refuse(
            "state_dir",
            f"{recipe.state_dir!r} would be a folder whose name begins with ~: give the whole path, or"
            f" ./{recipe.state_dir} if it is meant",
        )
    elif long := too_long(recipe.state_dir):
        findings.refuse("state_dir", f"{long}; give shorter names")
    uri = recipe.execution.tracking_uri
    if uri is None:
        return
    scheme = uri.partition("://")[0].partition("+")[0]
    if "://" not in uri or scheme not in TRACKING:
        findings.refuse(
            "execution.tracking_uri",
            f"{uri!r} is no address that MLflow takes: give http://host:port, sqlite:///file.db or"
            " postgresql://user@host/database, or leave it out",
        )
    elif scheme in {"http", "https"} and not _has_host(uri):
        findings.refuse("execution.tracking_uri", f"{uri!r} has no host, or one that can't be; give http://host:port")
    elif scheme == "sqlite" and not uri.partition("://")[2].lstrip("/").partition("?")[0].strip(":"):
        findings.refuse(
            "execution.tracking_uri", f"{uri!r} names no file, so that nothing would be kept; give sqlite:///file.db"
        )


def _has_host(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return is_host(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False


def _divisors(size: int, *, most: int) -> str:
    """The divisors of a batch size that are nearest to `most`: "4 or 8"."""
    below = _largest_divisor(size, most)
    above = next((number for number in range(most, min(size, 10**6) + 1) if size % number == 0), below)
    return f"{below} or {above}" if above != below else str(below)


def _largest_divisor(size: int, most: int) -> int:
    """Up to `most`, and not looked for among millions."""
    return next((number for number in range(min(size, most, 10**6), 0, -1) if size % number == 0), 1)
