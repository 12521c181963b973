"""A node of the graph: a stage at work in a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from infra.storage import Store
from pipelines.artifacts import Artifact, Identity, artifact_key
from pipelines.recipe import Execution
from pipelines.reporting import Report

Run = Callable[[Mapping[str, Artifact], Store, Report, Execution], Artifact]


@dataclass(frozen=True)
class Node:
    """A stage at work in a recipe."""

    name: str
    inputs: tuple[str, ...]
    format_version: int
    identify: Callable[[], Identity]
    """Says what is asked for. May read what the recipe names: lists, folders, weights."""
    run: Run
    needs_cluster: bool = True
    """Whether it works on Ray; the others run in this process."""

    @property
    def stage(self) -> str:
        """ "train" for "train.base"."""
        return self.name.partition(".")[0]

    @cached_property
    def identity(self) -> Identity:
        """All of the recipe that affects the result.

        Raises the errors of what is read: `pipelines.errors.WrongUsage` for a missing file, a wrong column, an empty
        list.
        """
        return self.identify()

    def key(self, inputs: Mapping[str, Artifact]) -> str:
        """Key of what is asked for, made from `inputs`. Raises as `identity` does."""
        used = {name: inputs[name] for name in self.inputs}
        return artifact_key(self.name, self.format_version, self.identity.content, used)
