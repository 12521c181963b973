"""Measures of an image and what it should show: an original, or a prompt."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldm.errors import InputError
from ldm.metrics.estimates import Estimate
from ldm.metrics.sets import checked, generator


def psnr(pixels_BCHW: Tensor, reference_BCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, float32 [B], for pixels in [-1, 1] (values beyond are
    clipped); infinite for equal images. Average decibels over images for a data set's figure.

    Raises `InputError` if the shapes differ, or pixels are whole numbers, which are not in [-1, 1].
    """
    if pixels_BCHW.shape != reference_BCHW.shape or pixels_BCHW.ndim < 2:
        shapes = f"{tuple(pixels_BCHW.shape)} and {tuple(reference_BCHW.shape)}"
        raise InputError(f"images are {shapes}: must be of one shape, [images, ...]")
    for pixels in (pixels_BCHW, reference_BCHW):
        if not pixels.is_floating_point():
            raise InputError(f"images are {pixels.dtype}: must be in [-1, 1] (ldm.latents.pixels_from_uint8)")
    error = pixels_BCHW.float().clamp(-1, 1) - reference_BCHW.float().clamp(-1, 1)
    # The peak is 2: the width of [-1, 1].
    return 10 * (4 / error.square().flatten(1).mean(dim=1)).log10()


def clip_scores(images_BD: Tensor, texts_BD: Tensor) -> Tensor:
    """100 max(cosine, 0) of each image's embedding with its text's, float64 [B] on the CPU, of any length but 0.

    The cosine is Hessel et al.'s (2021, equation 1), whose CLIP-S is 2.5 max(cosine, 0); 100 in place of 2.5 is what
    papers on text-to-image print. Gather them in a `RunningMean` for a set's figure.

    Raises `InputError` if the shapes differ, or for values that are not numbers or embeddings of length 0.
    """
    if images_BD.shape != texts_BD.shape:
        shapes = f"{tuple(images_BD.shape)} and {tuple(texts_BD.shape)}"
        raise InputError(f"embeddings of images and texts are {shapes}: must be of one shape")
    images, texts = checked(images_BD, "embeddings of images"), checked(texts_BD, "embeddings of texts")
    directions = []
    for embeddings, what in ((images, "image"), (texts, "text")):
        lengths = embeddings.norm(dim=1, keepdim=True)
        zero = (lengths == 0).nonzero()
        if len(zero):
            raise InputError(f"the embedding of {what} {int(zero[0, 0])} has length 0: look at the {what}")
        directions.append(embeddings / lengths)
    scores: Tensor = 100 * (directions[0] * directions[1]).sum(dim=1).clamp(min=0)
    return scores


def faithfulness(
    similarity_NN: Tensor, *, derangements: int, seed: int, groups: Sequence[Hashable] | None = None
) -> Estimate:
    """How much more a picture is like its own prompt than like others: the mean over prompts *i* of
    s[i, i] - mean over k of s[i, p_k(i)], where s[i, j] is the similarity of prompt *i* and the picture of prompt *j*,
    and p_k are `derangements` random permutations that leave no prompt in its place.

    The standard error is that of the mean over prompts; its ratio to the gap is `z`: about standard normal for pictures
    that know nothing of their prompts. No p_k leads from a prompt to another of its group: give equal prompts one.

    Raises `InputError` for a matrix that is not square or has values that are not numbers, no derangement, a seed below
    0, groups of another number of prompts, or a group with more than half of the prompts.
    """
    similarity = checked(similarity_NN, "similarities")
    count = len(similarity)
    if similarity.shape != (count, count) or derangements < 1:
        raise InputError(
            f"similarities {tuple(similarity.shape)}, {derangements} derangements: must be square, and one at least"
        )
    if groups is not None and len(groups) != count:
        raise InputError(f"groups of {len(groups)} prompts, similarities of {count}: must be as many")
    random = generator(seed)
    rows = torch.arange(count)
    others = torch.zeros(count, dtype=torch.float64)
    for _ in range(derangements):
        others += similarity[rows, torch.from_numpy(derangement(range(count) if groups is None else groups, random))]
    gaps = similarity.diagonal() - others / derangements
    return Estimate(float(gaps.mean()), float(gaps.std() / math.sqrt(count)))


def derangement(groups: Sequence[Hashable], random: np.random.Generator) -> NDArray[np.int64]:
    """A random permutation of the positions of `groups` that leads each one to a position of another group.

    A uniform permutation, mended by swaps with random positions. Raises `InputError` if there is none: with fewer than
    two positions, or a group that has more than half of them.
    """
    group = _numbered(groups)
    largest = int(np.bincount(group, minlength=1).max())
    if len(group) < 2 or 2 * largest > len(group):
        raise InputError(
            f"{len(group)} prompts, {largest} of them in one group: must be two at least, half in one group at most"
        )
    permutation = random.permutation(len(group))
    for at in np.flatnonzero(group[permutation] == group):
        if group[permutation[at]] != group[at]:  # mended with an earlier one
            continue
        fits = np.flatnonzero((group != group[at]) & (group[permutation] != group[at]))
        # There is one: each condition excludes `largest` positions at most, half of all, and both exclude `at`.
        swap = np.array([at, random.choice(fits)])
        permutation[swap] = permutation[swap[::-1]]
    return permutation


def _numbered(groups: Sequence[Hashable]) -> NDArray[np.int64]:
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], np.int64)
