"""What the loop needs of a kind of model. A module for each kind provides one; `kinds` names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from pipelines.dataset.figures import Figure
from pipelines.train.order import Sample

Batch = Mapping[str, Tensor]
Forward = Callable[..., Any]
"""The module's forward pass, as the engine runs it."""
Weights = Mapping[str, Tensor]
"""Parameters by name, float32, on the CPU."""
TimedStep = tuple[nn.Module, Callable[[], Tensor]]
"""What is trained, on its device, and its forward pass on one random batch."""


@dataclass(frozen=True)
class Preview:
    """What a model can do at this point."""

    pictures: Mapping[str, bytes] = field(default_factory=dict)
    """PNG by name."""
    figures: Sequence[Figure] = ()
    beside: Sequence[Figure] = ()
    """Figures that depend on `execution`: told, and noted beside the model, but no part of what is published."""


class Trainable(Protocol):
    """One kind of model with its data. Equal on all ranks; ranks differ in the samples they ask for."""

    @property
    def module(self) -> nn.Module:
        """What is trained: float32, its initial weights a function of the recipe's seed."""

    @property
    def num_samples(self) -> int:
        """Rows of the train split."""

    @property
    def revision(self) -> str:
        """Revision of the data whose rows `batch` takes."""

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """Inputs and noise of the samples, on the CPU."""

    def loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The mean loss of a batch, float32, and its parts by name, detached."""

    def preview(self, weights: Weights) -> Preview:
        """A look at the averaged weights, in few seconds. Called on rank 0 alone."""

    def write(self, weights: Weights, folder: Path) -> Sequence[Figure]:
        """Write the model to `folder`, which is empty. Figures that are part of it. Called on rank 0 alone."""

    def measure(self, weights: Weights) -> Preview:
        """A look at the finished model, as thorough as it ever gets. Called on rank 0 alone."""
