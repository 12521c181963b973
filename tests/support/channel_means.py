"""A fourth kind of model, as small as one can be: the mean of each colour channel of the selected images.

It is added from outside, by a row in each table of kinds. Run as a script, `channel_means.py RECIPE.json`, it trains
the recipe's model "means" in this process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

import pipelines.encode.kinds
import pipelines.evaluate.kinds
import pipelines.recipe.kinds
import pipelines.recipe.model_checks
import pipelines.release.kinds
import pipelines.train.kinds
import pipelines.workflow.kinds
from pipelines.dataset.acquired import acquired_of
from pipelines.dataset.figures import Figure
from pipelines.dataset.images import SelectedImages
from pipelines.recipe import AutoencoderModel, ClipModel, ModelBlock, Recipe, TextToImageModel, TrainSpec
from pipelines.recipe.kinds.kind import ModelKind, none, nothing, refers_to_nothing
from pipelines.recipe.problems import Findings
from pipelines.train.job import TrainJob
from pipelines.train.kinds import TrainKind
from pipelines.train.kinds import nothing as begins_with_its_seed
from pipelines.train.order import Sample
from pipelines.train.trainable import Batch, Forward, Preview, TimedStep, Weights
from pipelines.workflow.kinds.kind import WorkflowKind, selected_pairs, train_node
from pipelines.workflow.needs import Here

KIND = "channel_means"


class MeansModel(ModelBlock):
    """The mean of each colour channel (node `train.<name>`)."""

    kind: Literal["channel_means"]
    """Kind of the model."""
    start: float = 0.0
    """What all three numbers are before training."""
    preview_as: str = "numbers"
    """How the numbers are shown, which has no bearing on them."""
    train: TrainSpec
    """How the model is trained."""


class LargerRecipe(Recipe):
    """A recipe that may have the fourth kind too."""

    models: dict[
        str, Annotated[AutoencoderModel | ClipModel | TextToImageModel | MeansModel, Field(discriminator="kind")]
    ]


class Means(nn.Module):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.full((3,), start))

    def forward(self, pixels_BHWC: Tensor) -> Tensor:
        return (pixels_BHWC - self.means).square().mean()


class MeansTraining:
    """See `pipelines.train.trainable.Trainable`."""

    def __init__(self, job: TrainJob) -> None:
        acquire, select = acquired_of(job.inputs), job.inputs["select"]
        self._images = SelectedImages(job.store, acquire, select, split="train")
        self.num_samples = len(self._images)
        self.revision = select.revision
        self.module = Means(job.model.start)

    def batch(self, samples: Sequence[Sample]) -> Batch:
        return {"images": self._images.rows([sample.row for sample in samples])}

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        return forward(batch["images"].float() / 255), {}

    def preview(self, weights: Weights) -> Preview:
        means = enumerate(weights["means"])
        return Preview(figures=[Figure(f"channel_{number}", "train", float(mean)) for number, mean in means])

    def write(self, weights: Weights, folder: Path) -> Sequence[Figure]:
        (folder / "means.json").write_text(json.dumps(weights["means"].tolist()))
        return ()

    def measure(self, weights: Weights) -> Preview:
        return self.preview(weights)


def check(recipe: Recipe, name: str, model: MeansModel, findings: Findings) -> None:
    if not 0 <= model.start <= 1:
        findings.refuse(f"models.{name}.start", f"{model.start:g}: a mean is from 0 to 1")


def check_here(here: Here, name: str, model: MeansModel) -> None:
    if here.any_of(f"train.{name}"):
        here.need(f"models.{name}", ("torch",), "pip install torch", "leave the model out")


def timed_step(recipe: Recipe, model: MeansModel, batch_size: int, device: torch.device) -> TimedStep:
    network, side = Means(model.start).to(device), recipe.acquire.image.size_px
    pixels = torch.rand(batch_size, side, side, 3, device=device)
    return network, lambda: network(pixels)


ROWS: dict[Any, Any] = {
    pipelines.recipe.kinds: ModelKind(
        block=MeansModel,
        references=refers_to_nothing,
        uses=none,
        sampling=nothing,
        evaluation=nothing,
        is_part=False,
        is_released=False,
        compares_batch=False,
    ),
    pipelines.workflow.kinds: WorkflowKind(
        nodes=lambda recipe, name, model: (train_node(name, model, (*recipe.acquired, "select")),),
        released=None,
        check=check_here,
        pairs=selected_pairs,
    ),
    pipelines.train.kinds: TrainKind(
        trainable=lambda job, device, previews: MeansTraining(job),
        timed_step=timed_step,
        elsewhere=frozenset({"preview_as"}),
        begins_with=begins_with_its_seed,
    ),
    pipelines.encode.kinds: None,
    pipelines.evaluate.kinds: None,
    pipelines.release.kinds: None,
}
"""The row of each table `KINDS`, by the module that the table is in."""


def add_kind(put: Callable[[dict[str, Any], str, Any], None] = dict.__setitem__) -> None:
    """Adds the kind to every table."""
    for module, row in ROWS.items():
        put(module.KINDS, KIND, row)
    put(pipelines.recipe.model_checks.CHECKS, KIND, check)


def read_recipe(path: Path) -> LargerRecipe:
    return LargerRecipe.model_validate_json(path.read_text())


if __name__ == "__main__":
    from infra.ranks import join_process_group
    from pipelines.commands.torchrun import train

    add_kind()
    with join_process_group("cpu"):
        train(read_recipe(Path(sys.argv[1])), "means")
