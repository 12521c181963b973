"""How the nodes of a recipe stand, and what a run did: plain data for the terminal, the pages and programs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Literal

from pipelines.artifacts import Artifact
from pipelines.dataset.funnel import Funnel, funnel

State = Literal["up to date", "to do", "waiting"]


@dataclass(frozen=True)
class Asked:
    """How a recipe was named on the command line: what every further command about it repeats."""

    recipe: str
    overrides: tuple[str, ...] = ()

    def command(self, verb: str, *more: str) -> str:
        """ "ldm status quickstart --set store=/data", quoted for a shell."""
        sets = [part for override in self.overrides for part in ("--set", override)]
        return shlex.join(["ldm", verb, self.recipe, *sets, *more])


@dataclass(frozen=True)
class Row:
    """How one node stands. `artifact` is there when it is up to date."""

    node: str
    state: State
    why: str
    key: str | None = None
    artifact: Artifact | None = None


@dataclass
class NodeResult:
    artifact: Artifact
    made: bool
    """False where it was up to date."""
    duration_s: float


@dataclass
class RunResult:
    """What a run did: the artifacts of its nodes, in order, and where its records are."""

    nodes: dict[str, NodeResult] = field(default_factory=dict)
    tracking_uri: str | None = None
    duration_s: float = 0.0

    @property
    def artifacts(self) -> dict[str, Artifact]:
        return {name: result.artifact for name, result in self.nodes.items()}

    @property
    def funnel(self) -> Funnel:
        """Raises `CountsMismatch` if the counts of neighbouring stages don't fit."""
        return funnel(self.artifacts)
