"""An artifact's own figures and counts in a few words."""

from __future__ import annotations

from pipelines.artifacts import Artifact
from pipelines.dataset.figures import figures_of, is_number
from pipelines.terminal.measured import headline

# How a person reads the counts that the stages want remembered, most telling first.
COUNTS = {
    "steps": "{:,} steps",
    "images": "{:,} images",
    "train": "{:,} train",
    "held_out": "{:,} held out",
    "captions_cut": "{:,} captions cut",
}


def figures(artifact: Artifact) -> str:
    """ "KID 0.041 ± 0.002, 1,000 images"; empty where there are none."""
    found = numbers(artifact)
    counts = [text.format(found[name]) for name, text in COUNTS.items() if name in found]
    return ", ".join(filter(None, [headline(figures_of(artifact)), *counts]))


def numbers(artifact: Artifact) -> dict[str, float]:
    """The numbers among what the artifact's stage wanted remembered beside its figures."""
    return {name: value for name, value in artifact.info.items() if is_number(value)}
