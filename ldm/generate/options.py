"""What every task of generation can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from ldm.guidance import Guidance
from ldm.samplers import Spacing
from ldm.sampling import Progress

STEPS, SAMPLER, GUIDANCE_SCALE, BATCH_SIZE = 20, "dpmpp_2m", 3.0, 16
MAX_PIXELS = 4 * 1024 * 1024
"""That are decoded at a time, unless asked otherwise: four images of 1024 by 1024."""


@dataclass(frozen=True)
class Sizes:
    """What a network that is conditioned on sizes is told of each picture (Podell et al. 2023, section 2.2), in pixels
    as (height, width). None: the size that is made."""

    original: tuple[int, int] | None = None
    """Size of the image before it was scaled: small ones were blurred."""
    crop: tuple[int, int] = (0, 0)
    """Top and left of what was cut out: beyond 0, objects were cut off."""
    target: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    """Aesthetic score, from 1 to 10, which the refiner is told."""
    negative_aesthetic_score: float = 2.5
    """What guidance goes away from."""


class Options(TypedDict, total=False):
    """Keywords of all tasks; each has a default."""

    seeds: Sequence[int]
    """Seeds, one for each picture, from which its noise is drawn. Needed, unless a task is given its noise."""
    guidance_scale: float
    """Scale of guidance, 3 by default: towards the prompt and away from the empty one; 1 is without guidance, and half
    the work."""
    guidance: Guidance
    """Guidance in the place of `guidance_scale`: rescale, interval, a weak network."""
    negative_prompts: Sequence[str]
    """Prompts to go away from, one for each picture, in the place of the empty prompt."""
    sampler: str
    """One of `ldm.samplers.SAMPLERS`; the model's own, and "dpmpp_2m" where it has none."""
    steps: int
    """Number of steps, 20 by default."""
    spacing: Spacing
    """Spacing of the levels; the model's, and the sampler's own where it has none."""
    eta: float
    """How much of the noise is drawn anew, 0 to 1, by samplers that take it."""
    threshold: tuple[float, float]
    """Percentile and limit of dynamic thresholding, for models of pixels."""
    sizes: Sizes
    """Sizes for networks that are conditioned on them."""
    batch_size: int
    """Number of pictures made at a time, 16 by default."""
    max_pixels: int
    """Number of pixels decoded at a time; a larger image is decoded in tiles."""
    progress: Progress
