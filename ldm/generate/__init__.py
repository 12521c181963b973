"""From prompts and images to images: conditions, guidance, sampler and decoder put together."""

from ldm.generate.options import Options, Sizes
from ldm.generate.run import decode_latents
from ldm.generate.tasks import (
    cascade,
    conditions_to_image,
    image_to_image,
    image_variations,
    inpaint,
    text_to_image,
    upscale,
)
from ldm.model import LatentDiffusion

__all__ = [
    "LatentDiffusion",
    "Options",
    "Sizes",
    "cascade",
    "conditions_to_image",
    "decode_latents",
    "image_to_image",
    "image_variations",
    "inpaint",
    "text_to_image",
    "upscale",
]
