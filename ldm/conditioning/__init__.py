"""What a generation is conditioned on, in the one form that the U-Net takes.

Encoders live in modules beside this one, one module a kind, and import their library where they are built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ldm.errors import InputError

Given_contra = TypeVar("Given_contra", contravariant=True)


@dataclass(frozen=True)
class Conditioning:
    """A batch of conditions. Raises `InputError` if the parts don't fit each other."""

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
        for name, part in (("pooled", self.pooled), ("sizes", self.sizes)):
            if part is not None and (part.ndim != 2 or len(part) != len(self.context)):
                raise InputError(f"{name} is {tuple(part.shape)}: must be [{len(self.context)}, width]")
        level = self.noise_level
        if level is not None and (level.shape != self.context.shape[:1] or level.dtype != torch.int64):
            raise InputError(
                f"noise_level is {level.dtype} {tuple(level.shape)}: must be torch.int64 ({len(self.context)},)"
            )

    def __len__(self) -> int:
        return len(self.context)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that are there, by field."""
        return {name: part for name, part in vars(self).items() if part is not None}

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Conditioning:
        """The conditions of these rows, in this order."""
        return Conditioning(**{name: part[rows] for name, part in self.parts.items()})

    def expand(self, count: int) -> Conditioning:
        """The one condition, `count` times (without copies). Raises `InputError` if there is more than one."""
        if len(self) != 1:
            raise InputError(f"expand needs one condition, this has {len(self)}")
        return Conditioning(**{name: part.expand(count, *part.shape[1:]) for name, part in self.parts.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """The conditions on another device, or with context and pooled of another dtype. Pixels and levels keep theirs:
        in bfloat16, 1001 is 1000."""
        states = ("context", "pooled")
        return Conditioning(
            **{name: part.to(device, dtype if name in states else part.dtype) for name, part in self.parts.items()}
        )

    def lengthened(self, length: int) -> Conditioning:
        """The context on `length` positions; attention over it gives what it gave before.

        It is repeated if that is a whole number of times, as the null of a prompt of several chunks is, and otherwise
        filled up with positions that a mask hides. Raises `InputError` if it is longer already.
        """
        before = self.context.shape[1]
        if before > length:
            raise InputError(f"context has {before} positions: can't be lengthened to {length}")
        if length == before:
            return self
        if before and length % before == 0:
            mask = None if self.mask is None else self.mask.repeat(1, length // before)
            return replace(self, context=self.context.repeat(1, length // before, 1), mask=mask)
        context = torch.nn.functional.pad(self.context, (0, 0, 0, length - before))
        return replace(self, context=context, mask=torch.nn.functional.pad(_whole_mask(self), (0, length - before)))

    def where_null(self, dropped_B: Tensor, null: Conditioning) -> Conditioning:
        """The conditions, with the null condition's in the rows where `dropped_B` (bool) is true (Ho & Salimans 2022,
        algorithm 1).

        `null` has one row, or one for each, and is lengthened if this one is longer. Sizes and noise levels are not
        dropped: they say how the pixels came to be, and hold under every condition. Raises `InputError` for a null that
        doesn't fit.
        """
        if dropped_B.shape != (len(self),) or dropped_B.dtype != torch.bool:
            raise InputError(
                f"dropped is {dropped_B.dtype} {tuple(dropped_B.shape)}: must be torch.bool ({len(self)},)"
            )
        null = (null.expand(len(self)) if len(null) == 1 else null).lengthened(self.context.shape[1])
        if (self.pooled is None) != (null.pooled is None) or null.context.shape != self.context.shape:
            raise InputError(
                f"the null condition has {_shapes(null)}, the conditions {_shapes(self)}: they must be of one encoder"
            )
        dropped_B = dropped_B.to(self.context.device)
        mask, pooled = None, None
        if self.mask is not None or null.mask is not None:
            mask = torch.where(dropped_B[:, None], _whole_mask(null), _whole_mask(self))
        if self.pooled is not None and null.pooled is not None:
            pooled = torch.where(dropped_B[:, None], null.pooled.to(self.pooled), self.pooled)
        context = torch.where(dropped_B[:, None, None], null.context.to(self.context), self.context)
        return replace(self, context=context, mask=mask, pooled=pooled)

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """One batch of all parts' conditions, `lengthened` to the longest. A part without a mask gets one of true if
        another has one.

        Raises `InputError` for no parts, for differing widths, and if only some have `pooled`, `sizes` or
        `noise_level`.
        """
        if not parts:
            raise InputError("no conditions to concatenate: give at least one")
        widths = {part.context.shape[2] for part in parts}
        if len(widths) > 1:
            raise InputError(f"contexts are of {len(widths)} widths, {sorted(widths)}: must be equal")
        longest = max(part.context.shape[1] for part in parts)
        parts = [part.lengthened(longest) for part in parts]
        whole = {"context": torch.cat([part.context for part in parts])}
        if any(part.mask is not None for part in parts):
            whole["mask"] = torch.cat([_whole_mask(part) for part in parts])
        for name in ("pooled", "sizes", "noise_level"):
            found = [part.parts[name] for part in parts if name in part.parts]
            if found and len(found) != len(parts):
                raise InputError(f"{len(found)} of {len(parts)} conditions have `{name}`: all must, or none")
            if len({each.shape[1:] for each in found}) > 1:
                raise InputError(f"{name} is of {[tuple(each.shape) for each in found]}: widths must be equal")
            if found:
                whole[name] = torch.cat(found)
        return Conditioning(**whole)

    @staticmethod
    def join(parts: Sequence[Conditioning]) -> Conditioning:
        """Several conditions on the same rows, as one: contexts and masks one after another along the length, pooled
        vectors side by side. Contexts are of one width, as `ldm.conditioning.joint` makes them.

        Raises `InputError` for no parts, for differing batches or widths, and if more than one has `sizes` or
        `noise_level`.
        """
        if not parts:
            raise InputError("no conditions to join: give at least one")
        shapes = {(len(part), part.context.shape[2]) for part in parts}
        if len(shapes) > 1:
            raise InputError(f"batches and widths are {sorted(shapes)}: must be equal; widths by a projection")
        whole = {"context": torch.cat([part.context for part in parts], dim=1)}
        if any(part.mask is not None for part in parts):
            whole["mask"] = torch.cat([_whole_mask(part) for part in parts], dim=1)
        pooled = [part.pooled for part in parts if part.pooled is not None]
        if pooled:
            whole["pooled"] = torch.cat(pooled, dim=1)
        for name in ("sizes", "noise_level"):
            found = [part.parts[name] for part in parts if name in part.parts]
            if len(found) > 1:
                raise InputError(f"{len(found)} of the joined conditions have `{name}`: one at most may")
            if found:
                whole[name] = found[0]
        return Conditioning(**whole)


class Encoder(Protocol[Given_contra]):
    """A model that reads one kind of condition: prompts, images or sounds."""

    @property
    def width(self) -> int:
        """D of the context."""

    @property
    def length(self) -> int:
        """L of the context; of each of its chunks, if prompts over the limit are kept in chunks."""

    @property
    def identity(self) -> str:
        """Name and weights: equal identities give equal contexts."""

    def encode(self, given: Given_contra, /) -> Conditioning:
        """The context of each, [B, length, width] float32, on the encoder's device."""

    def null(self, count: int) -> Conditioning:
        """`count` times the condition that says nothing, for guidance and for dropout in training."""


class TextEncoder(Encoder[list[str]], Protocol):
    """A frozen model that reads prompts. Its `length` counts tokens, special ones included; its null is the empty
    prompt, or zeros."""


def _whole_mask(conditioning: Conditioning) -> Tensor:
    if conditioning.mask is not None:
        return conditioning.mask
    return torch.ones(conditioning.context.shape[:2], dtype=torch.bool, device=conditioning.context.device)


def _shapes(conditioning: Conditioning) -> str:
    return ", ".join(f"{name} {tuple(part.shape)}" for name, part in conditioning.parts.items())
