"""Measures of images, as pure functions."""

from __future__ import annotations

from torch import Tensor

from ldm.errors import InputError


def psnr(pixels_BCHW: Tensor, reference_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, float32 [B], for pixels in [-1, 1] (values beyond are
    clipped); infinite for equal images. Average decibels over images for a data set's figure.

    Raises `InputError` if the shapes differ.
    """
    if pixels_BCHW.shape != reference_BCHW.shape:
        shapes = f"{tuple(pixels_BCHW.shape)} and {tuple(reference_BCHW.shape)}"
        raise InputError(f"images are {shapes}: must be of one shape")
    error = pixels_BCHW.float().clamp(-1, 1) - reference_BCHW.float().clamp(-1, 1)
    # The peak is 2: the width of [-1, 1].
    return 10 * (4 / error.square().flatten(1).mean(dim=1)).log10()
