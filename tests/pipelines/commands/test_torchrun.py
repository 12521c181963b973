"""`python -m pipelines.train`, alone and under torchrun: what the workflow then finds up to date."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from infra.storage import Store
from pipelines.artifacts import Artifact, find
from pipelines.building import building
from pipelines.recipe.file import load_recipe
from pipelines.workflow.graph import build_graph

RECIPE = """
name: tiny
source: {kind: urls, files: [urls.csv]}
acquire: {fetch: {contact: "https://a.example/crawler"}}
models:
  autoencoder:
    kind: autoencoder
    network: {block_out_channels: [8, 8, 8], layers_per_block: 1, norm_num_groups: 4, mid_block_add_attention: false}
    train: {steps: 3, global_batch_size: 8, lanes: 4, precision: fp32}
execution: {device: cpu, cpus: 1, log_every_steps: 1}
"""


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def recipe(tmp_path, store, monkeypatch) -> str:
    """A recipe whose autoencoder is still to be trained, in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("urls.csv").write_text("url,caption\nhttps://example.org/1.png,one\n")
    Path("recipe.yaml").write_text(RECIPE + f"store: {store.url}\n")
    return "recipe.yaml"


def republished(store, node, artifact: Artifact, inputs) -> Artifact:
    """The artifact's units as what a node of a recipe published."""
    with building(store, node.name, node.identity, inputs, {}, node.format_version) as build:
        return build.publish(artifact.units)


def make_inputs(store, published, recipe) -> dict[str, Artifact]:
    """What the recipe's autoencoder is trained on, published by its nodes."""
    nodes = build_graph(load_recipe(recipe))
    acquire = published.acquire()
    inputs = {"acquire": republished(store, nodes["acquire"], acquire, {})}
    return inputs | {"select": republished(store, nodes["select"], published.select(acquire), inputs)}


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]


@pytest.mark.parametrize(
    "launcher",
    [pytest.param(["-m"], id="alone"), pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.slow)],
)
def test_it_publishes_what_the_workflow_looks_for(store, published, recipe, launcher):
    inputs = make_inputs(store, published, recipe)
    command = [sys.executable, *launcher, "pipelines.train", recipe, "autoencoder"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    node = build_graph(load_recipe(recipe))["train.autoencoder"]
    trained = find(store, node.name, node.key(inputs))
    assert trained is not None
    assert trained.info["steps"] == 3
    assert trained.info["ranks"] == (2 if len(launcher) > 1 else 1)


def test_inputs_that_are_not_there_are_named(recipe):
    command = [sys.executable, "-m", "pipelines.train", recipe, "autoencoder"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "acquire is to do" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_it_soon_with_one_line(store, published, recipe, number):
    make_inputs(store, published, recipe)
    command = [sys.executable, "-m", "pipelines.train", recipe, "autoencoder", "--set"]
    process = subprocess.Popen(
        [*command, "models.autoencoder.train.steps=100000"], env=environment(), stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "metrics step=2 " in line:
            break
    process.send_signal(number)
    told = process.communicate(timeout=50)[1]
    assert process.returncode == 130
    assert told.splitlines()[-1] == "interrupted; run the same command again to go on from the last checkpoint"
    assert "Traceback" not in told


def test_a_device_that_is_not_there_is_refused(recipe, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = [sys.executable, "-m", "pipelines.train", recipe, "autoencoder", "--set", "execution.device=cuda"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: device is 'cuda' and 1 ranks train on this node")
