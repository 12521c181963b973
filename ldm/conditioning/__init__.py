"""What a generation is conditioned on, in the one form that the U-Net takes.

Encoders live in modules beside this one, and import their library where they are built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.errors import InputError


@dataclass(frozen=True)
class Conditioning:
    """A batch of conditions."""

    context: Tensor
    """[B, L, D]: states that cross-attention reads."""
    mask: Tensor | None = None
    """Bool [B, L], true where the context may be attended to. None: everywhere."""
    pooled: Tensor | None = None
    """[B, P]: one vector for the whole, for networks that take one."""
    sizes: Tensor | None = None
    """[B, S], pixels: how an image was cut (Podell et al. 2023, section 2.2): height and width of the original, top and
    left of the crop, then height and width of the result (SDXL), or an aesthetic score (its refiner)."""
    noise_level: Tensor | None = None
    """Int64 [B]: how noisy the image is that an upscaler's latents come with (Ho et al. 2022, section 4.2)."""

    def __post_init__(self) -> None:
        if self.context.ndim != 3:
            raise InputError(f"context is {tuple(self.context.shape)}: must be [batch, length, width]")
        if self.mask is not None and (self.mask.shape != self.context.shape[:2] or self.mask.dtype != torch.bool):
            raise InputError(
                f"mask is {self.mask.dtype} {tuple(self.mask.shape)}: must be bool {tuple(self.context.shape[:2])}"
            )
        if self.pooled is not None and (self.pooled.ndim != 2 or len(self.pooled) != len(self.context)):
            raise InputError(f"pooled is {tuple(self.pooled.shape)}: must be [{len(self.context)}, width]")

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Conditioning:
        """The conditions of these rows, in this order."""
        return self._each(lambda part: part[rows])

    def expand(self, count: int) -> Conditioning:
        """The one condition, `count` times (without copies). Raises `InputError` if there is more than one."""
        if len(self) != 1:
            raise InputError(f"expand needs one condition, this has {len(self)}")
        return self._each(lambda part: part.expand(count, *part.shape[1:]))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """The same on another device, or with states of another dtype."""
        return self._each(lambda part: part.to(device, part.dtype if part.dtype == torch.bool else dtype))

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """One batch of all parts' conditions. A part without a mask gets one of true if another has one.

        Raises `InputError` for no parts, for differing lengths or widths, and if only some have `pooled`.
        """
        if not parts:
            raise InputError("no conditions to concatenate: give at least one")
        shapes = {tuple(part.context.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise InputError(
                f"contexts are of {len(shapes)} shapes, {sorted(shapes)}: lengths and widths must be equal"
            )
        pooled = [part.pooled for part in parts if part.pooled is not None]
        if pooled and len(pooled) != len(parts):
            raise InputError(f"{len(pooled)} of {len(parts)} conditions have `pooled`: all must, or none")
        mask = None
        if any(part.mask is not None for part in parts):
            mask = torch.cat([_whole_mask(part) for part in parts])
        context = torch.cat([part.context for part in parts])
        return Conditioning(context, mask, torch.cat(pooled) if pooled else None)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(
            change(self.context),
            None if self.mask is None else change(self.mask),
            None if self.pooled is None else change(self.pooled),
        )


class TextEncoder(Protocol):
    """A frozen model that reads prompts."""

    @property
    def width(self) -> int:
        """D of the context."""

    @property
    def length(self) -> int:
        """L of the context: the most tokens that a prompt may have, special ones included."""

    @property
    def identity(self) -> str:
        """Name and weights: equal identities give equal contexts."""

    def encode(self, prompts: list[str]) -> Conditioning:
        """The prompts' states, [len(prompts), length, width] float32, on the encoder's device."""

    def null(self, count: int) -> Conditioning:
        """`count` times the empty prompt."""


def _whole_mask(conditioning: Conditioning) -> Tensor:
    if conditioning.mask is not None:
        return conditioning.mask
    return torch.ones(conditioning.context.shape[:2], dtype=torch.bool, device=conditioning.context.device)
