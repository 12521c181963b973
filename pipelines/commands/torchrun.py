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
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from infra.storage import Store
from pipelines.artifacts import Artifact, find
from pipelines.building import building
from pipelines.errors import UnknownNode
from pipelines.recipe import Recipe
from pipelines.recipe.file import load_recipe
from pipelines.reporting import LogReport
from pipelines.train.errors import TrainError
from pipelines.train.job import TrainJob
from pipelines.train.loop import train_worker
from pipelines.train.stage import make_job, publish
from pipelines.workflow.graph import Node, build_graph, selected
from pipelines.workflow.plan import plan

logger = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m pipelines.train", description=__doc__)
    parser.add_argument("recipe", help="a shipped recipe's name or a YAML file")
    parser.add_argument("model", help="name of one of its models")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="override a key of the recipe")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    recipe = load_recipe(options.recipe, [*options.set, f"execution.ranks={world_size}"])
    with _process_group():
        train(recipe, options.model)


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
        dist.broadcast_object_list(jobs)
        if jobs[0] is None:
            logger.info("%s is up to date", node.name)
            return
        train_worker(jobs[0], LogReport())
        if build is not None:
            logger.info("%s is at %s", node.name, store.location(publish(build, jobs[0]).path))


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


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """Of torchrun's environment, or of this process alone."""
    if "WORLD_SIZE" not in os.environ:
        numbers = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", **numbers})
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
