"""An artifact's own figures in a few words."""

from __future__ import annotations

from pipelines.artifacts import Artifact
from pipelines.terminal.measured import distances

# How a person reads what the stages want remembered, most telling first.
FIGURES = {
    "held_out_psnr_db": "{:.1f} dB PSNR held out",
    "steps": "{:,} steps",
    "images": "{:,} images",
    "train": "{:,} train",
    "held_out": "{:,} held out",
    "captions_cut": "{:,} captions cut",
}


def figures(artifact: Artifact) -> str:
    """ "KID 0.041 ± 0.002, 1,000 images"; empty where there are none."""
    found = numbers(artifact)
    told = []
    if artifact.stage.startswith("evaluate."):  # others note distances on their way, of other sets
        told = [f"{distance.name} {distance.figure}" for distance in distances(artifact.info)]
    return ", ".join([*told, *(text.format(found[name]) for name, text in FIGURES.items() if name in found)])


def numbers(artifact: Artifact) -> dict[str, float]:
    """The figures among what the artifact's stage wanted remembered."""
    return {
        name: value
        for name, value in artifact.info.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
