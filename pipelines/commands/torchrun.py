"""`python -m pipelines.train RECIPE MODEL [--set A.B=VALUE]`: one model of a recipe, without Ray or Dagster.

Under torchrun, `torchrun --nproc-per-node 2 -m pipelines.train RECIPE MODEL` trains on that many ranks. The model's
inputs must be up to date (`ldm run RECIPE --until NODE` makes them); the result has the same key as the workflow's.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Mapping

import torch
import torch.distributed as dist

from infra.engine import EngineError
from infra.locks import Locked
from infra.ranks import DeviceUnavailable, choose_device, join_process_group, objects_group
from infra.signals import interruptible
from infra.storage import StorageError, Store
from ldm.errors import LdmError
from pipelines.artifacts import Artifact, find
from pipelines.building import building
from pipelines.errors import EXIT_FAILED, EXIT_INTERRUPTED, LatentworksError, UnknownNode
from pipelines.recipe import Recipe
from pipelines.recipe.file import checked_recipe
from pipelines.reporting import LogReport
from pipelines.train.errors import TrainError
from pipelines.train.job import TrainJob
from pipelines.train.loop import train_worker
from pipelines.train.stage import make_job, publish
from pipelines.workflow.graph import build_graph, selected
from pipelines.workflow.node import Node
from pipelines.workflow.plan import plan, remember

INTERRUPTED = "interrupted; run the same command again to go on from the last checkpoint"
SPEAK_FOR_THEMSELVES = (LatentworksError, LdmError, EngineError, StorageError, DeviceUnavailable, Locked)

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.train", description=__doc__)
    parser.add_argument("recipe", help="a shipped recipe's name or a YAML file")
    parser.add_argument("model", help="name of one of its models")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a key of the recipe")
    parser.add_argument("--allow-plugins", action="store_true", help="run plugins of a recipe that is no local file")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    try:
        with interruptible():
            _train_here(options.recipe, options.model, options.set, options.allow_plugins)
    except KeyboardInterrupt:
        _end(INTERRUPTED, EXIT_INTERRUPTED)
    except SPEAK_FOR_THEMSELVES as error:
        logger.debug("failed", exc_info=error)
        _end(f"error: {error}", getattr(error, "exit_code", EXIT_FAILED))


def train(recipe: Recipe, model_name: str) -> None:
    """Train one model on the ranks of the process group, and publish it.

    Raises `TrainError` if the recipe has no such model, or its inputs aren't there.
    """
    store = Store(recipe.store)
    node, inputs = _node_and_inputs(recipe, model_name, store)
    jobs: list[TrainJob | None] = [None]
    with contextlib.ExitStack() as stack:
        build = None
        if dist.get_rank() == 0 and find(store, node.name, node.key(inputs)) is None:
            execution = recipe.execution.model_dump(mode="json")
            build = stack.enter_context(
                building(store, node.name, node.identity, inputs, execution, node.format_version)
            )
            jobs[0] = make_job(build, model_name, recipe.model(model_name), recipe.execution)
        dist.broadcast_object_list(jobs, group=objects_group())
        if jobs[0] is None:
            logger.info("%s is up to date", node.name)
            return
        train_worker(jobs[0], LogReport())
        if build is not None:
            artifact = publish(build, jobs[0])
            remember(store, recipe.name, node.name, artifact)
            logger.info("%s is at %s", node.name, store.location(artifact.path))


def _train_here(recipe_name: str, model_name: str, overrides: list[str], allow_plugins: bool) -> None:
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    world_size, local_world_size = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    recipe = checked_recipe(
        recipe_name, [*overrides, f"execution.ranks={world_size}"], allow_plugins=allow_plugins
    ).recipe
    wanted = recipe.execution.device
    device = choose_device(wanted, local_rank, local_world_size).type
    if device != wanted and rank == 0 and torch.cuda.is_available() and device == "cpu":
        gpus = torch.cuda.device_count()
        logger.warning("training on the CPU: %d ranks on this node, which has %d GPUs", local_world_size, gpus)
    execution = recipe.execution.model_copy(update={"device": device})  # what was chosen before anything was loaded
    with join_process_group("cuda" if device == "cuda" else "cpu"):
        train(recipe.model_copy(update={"execution": execution}), model_name)


def _node_and_inputs(recipe: Recipe, model_name: str, store: Store) -> tuple[Node, Mapping[str, Artifact]]:
    name = f"train.{model_name}"
    try:
        nodes = selected(build_graph(recipe), name)
    except UnknownNode as error:
        raise TrainError(str(error)) from error
    rows = {row.node: row for row in plan(nodes, store, recipe.name)}
    inputs = {}
    for needed in nodes[name].inputs:
        artifact = rows[needed].artifact
        if artifact is None:
            raise TrainError(f"{needed} is {rows[needed].state}: {rows[needed].why}; run it first (`ldm run`)")
        inputs[needed] = artifact
    return nodes[name], inputs


def _end(message: str, code: int) -> None:
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    sys.stderr.write(f"{message}\n" if alone else f"rank {os.environ['RANK']}: {message}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
