"""`ldm doctor`: both precisions are timed on what the recipe trains, and the advice follows the times."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from typer.testing import CliRunner

from pipelines.commands.doctor import advised, doctor
from pipelines.recipe.file import load_recipe
from pipelines.train import steps
from pipelines.train.steps import StepTimes, time_steps

app = typer.Typer()
app.command()(doctor)

SMALL = (
    *("models.autoencoder.network.block_out_channels=[8,8,8]", "models.autoencoder.network.norm_num_groups=4"),
    *("models.base.network.block_out_channels=[16,16]", "models.base.network.norm_num_groups=4"),
    *("models.clip.network.image_tower=vit", "models.clip.network.image_width=32", "models.clip.network.text_width=32"),
    *("models.autoencoder.init=scratch", "execution.device=cpu"),
)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "ROUNDS", 3)


def test_every_model_is_timed_in_both_precisions_and_gets_an_advice() -> None:
    options = [part for override in SMALL for part in ("--set", override)]
    result = CliRunner().invoke(app, ["quickstart", "--json", *options], catch_exceptions=False)
    found = json.loads(result.stdout)
    recipe = load_recipe("quickstart", SMALL)
    assert found.keys() == recipe.models.keys()
    for name, times in found.items():
        assert times["rounds"] == 3
        assert all(seconds > 0 for seconds in times["seconds"].values())
        assert times["batch_size"] == recipe.models[name].train.global_batch_size // recipe.execution.ranks
        assert "stays" in times["advice"] or f"models.{name}.train.precision" in times["advice"]


@pytest.mark.parametrize("name", ["autoencoder", "clip", "base"])
def test_the_network_computes_in_the_precision_that_is_timed(name: str) -> None:
    seen: set[torch.dtype] = set()

    def watch(layer: nn.Module, given: object, output: object) -> None:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            assert isinstance(output, torch.Tensor)
            seen.add(output.dtype)

    recipe, threads = load_recipe("quickstart", SMALL), torch.get_num_threads()
    watching = register_module_forward_hook(watch)
    try:
        times = time_steps(recipe, name)
    finally:
        watching.remove()
    assert seen == {torch.float32, torch.bfloat16}
    assert times.seconds.keys() == {"fp32", "bf16"}
    assert torch.get_num_threads() == threads


def test_the_advice_is_what_is_faster_unless_it_hardly_matters() -> None:
    def times(fp32: float, bf16: float) -> StepTimes:
        return StepTimes(8, "cpu", 2, 11, {"fp32": fp32, "bf16": bf16})

    assert advised("base", times(2.0, 1.0), "fp32") == (
        "write models.base.train.precision: bf16, 2.00 times as fast here"
    )
    assert advised("base", times(1.0, 2.0), "bf16") == (
        "write models.base.train.precision: fp32, 2.00 times as fast here"
    )
    assert advised("base", times(1.0, 2.0), "fp32") == "fp32 stays: 2.00 times as fast here"
    assert advised("base", times(1.0, 1.04), "bf16") == "bf16 stays: both take the same time here"
