"""Perceptual distance of images: differences of unit-normalised VGG16 features (LPIPS; Zhang et al. 2018, section 3).

Weights come from a file of torchvision's VGG16, or from the package stlpips-pytorch, whose variant tolerates shifts
(Ghildyal & Liu 2022). The network is frozen; gradients reach the images.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ldm.errors import InputError
from ldm.features import ExtractorMissing

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG16's convolutions between its poolings (Simonyan & Zisserman 2015, table 1, column D)."""

MEAN = (-0.030, -0.088, -0.188)
STD = (0.458, 0.448, 0.450)
"""ImageNet's, for pixels in [-1, 1]."""

LEAST_PX = 2 ** len(BLOCKS)
"""Side of the smallest image that the whole network can take."""

SHIFT_TOLERANT = "stlpips_pytorch/weights/vST0.0/vgg_shift_tolerant.pth"


class Perceptual(nn.Module):
    """The distance of pairs of images, summed over the last features of each block of VGG16."""

    mean: Tensor
    std: Tensor

    def __init__(self, blocks: Sequence[Sequence[int]] = BLOCKS, *, shift_tolerant: bool = False) -> None:
        """Weights are undefined until loaded by `load_perceptual`, those of channels are 1.

        `shift_tolerant` pools densely, then blurs and halves (Zhang 2019), where VGG16 has 2x2 maxima.
        """
        super().__init__()
        self.shift_tolerant = shift_tolerant
        pairs = pairwise((3, *(width for widths in blocks for width in widths)))
        self.convolutions = nn.ModuleList(nn.Conv2d(before, after, 3, padding=1) for before, after in pairs)
        self.lengths = tuple(len(widths) for widths in blocks)
        self.channel_weights = nn.ParameterList(torch.ones(1, widths[-1], 1, 1) for widths in blocks)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])
        self.requires_grad_(False)

    def forward(self, one_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
        """Distances [B] float32, 0 for equal images, of pixels in [-1, 1], [B, 3, H, W] each.

        Raises `InputError` if the shapes differ, or are too small for the poolings.
        """
        least = 2 ** len(self.lengths)
        shape = tuple(one_BCHW.shape)
        if shape != tuple(other_BCHW.shape) or len(shape) != 4 or shape[1] != 3 or min(shape[2:]) < least:
            raise InputError(
                f"images are {shape} and {tuple(other_BCHW.shape)}: must both be [batch, 3, height, width], sides of"
                f" {least} or more"
            )
        both = torch.cat([one_BCHW, other_BCHW]).contiguous(memory_format=torch.channels_last)
        total = torch.zeros(len(one_BCHW), device=one_BCHW.device)
        for features, weights in zip(self.features(both), self.channel_weights, strict=True):
            one, other = F.normalize(features.float(), dim=1, eps=1e-10).chunk(2)
            total = total + F.conv2d((one - other).square(), weights.float()).mean(dim=(1, 2, 3))
        return total

    def features(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """After the last activation of each block: [B, C, H, W], [B, C', H/2, W/2], ..."""
        first = self.channel_weights[0]
        hidden = ((pixels_BCHW - self.mean) / self.std).to(first.dtype)
        convolutions = iter(self.convolutions)
        found: list[Tensor] = []
        for index, length in enumerate(self.lengths):
            if index:
                hidden = _blurred_pool(hidden) if self.shift_tolerant else F.max_pool2d(hidden, 2)
            for convolution in islice(convolutions, length):
                hidden = F.relu(convolution(hidden))
            found.append(hidden)
        return found


def load_perceptual(
    path: Path | None = None, linear: Path | None = None, *, device: torch.device | str = "cpu"
) -> Perceptual:
    """The frozen distance with weights of a file: a state dict of torchvision's `vgg16`, .pth or .safetensors.

    `linear` is a file of learned weights of channels in LPIPS' names (`lin0.model.1.weight`, ...); without it channels
    weigh the same. Without a path, weights of both kinds are those of the package stlpips-pytorch, if installed.

    Raises `ExtractorMissing` if the package or a file is absent, or doesn't hold these weights.
    """
    network = Perceptual(shift_tolerant=path is None)
    path, linear = (path, linear) if path is not None else (_packaged(),) * 2
    state = _read(path)
    names = sorted((name for name in state if re.fullmatch(r"(features|net\.slice\d)\.\d+\.weight", name)), key=_place)
    if len(names) != len(network.convolutions):
        raise ExtractorMissing(
            f"{path} has {len(names)} convolutions, VGG16 {len(network.convolutions)}: give its file"
        )
    for convolution, name in zip(network.convolutions, names, strict=True):
        assert isinstance(convolution, nn.Conv2d)
        assert convolution.bias is not None
        _fill(convolution.weight, path, state, name)
        _fill(convolution.bias, path, state, name.removesuffix("weight") + "bias")
    if linear is not None:
        state = state if linear == path else _read(linear)
        for index, weight in enumerate(network.channel_weights):
            _fill(weight, linear, state, f"lin{index}.model.1.weight")
    return network.eval().to(device)


@torch.no_grad()
def _fill(target: Tensor, path: Path, state: Mapping[str, Tensor], name: str) -> None:
    if name not in state or state[name].shape != target.shape:
        found = tuple(state[name].shape) if name in state else "absent"
        raise ExtractorMissing(f"{path}: {name} is {found}, must be {tuple(target.shape)}: these are other weights")
    target.copy_(state[name])


def _place(name: str) -> int:
    return int(name.split(".")[-2])


def _packaged() -> Path:
    # The package's own modules need IPython and torchsummary: only its file of weights is read.
    spec = importlib.util.find_spec("stlpips_pytorch")
    if spec is None or not spec.submodule_search_locations:
        raise ExtractorMissing(
            "the perceptual loss needs weights: pip install stlpips-pytorch, or give the path of torchvision's VGG16"
        )
    return Path(next(iter(spec.submodule_search_locations))).parent / SHIFT_TOLERANT


def _read(path: Path) -> dict[str, Tensor]:
    try:
        safe = path.suffix == ".safetensors"
        state: dict[str, Tensor] = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ExtractorMissing(f"weights {path} can't be read ({error}): give a state dict of VGG16") from error
    return state


def _blurred_pool(x_BCHW: Tensor) -> Tensor:
    """2x2 maxima at every position, then a binomial 3x3 filter at every second, over mirrored borders of 2."""
    channels = x_BCHW.shape[1]
    binomial = torch.tensor([1.0, 2.0, 1.0], dtype=x_BCHW.dtype, device=x_BCHW.device) / 4
    kernel = (binomial[:, None] * binomial).expand(channels, 1, 3, 3)
    dense = F.pad(F.max_pool2d(x_BCHW, 2, stride=1), (2, 2, 2, 2), mode="reflect")
    return F.conv2d(dense, kernel, stride=2, groups=channels)
