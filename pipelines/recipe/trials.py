"""Trying to make what a block of the recipe asks for, and telling at its key why it can't be made."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from ldm.errors import ConfigError
from pipelines.recipe.block import Block
from pipelines.recipe.problems import Findings, listed

ENOUGH_LAYERS = 2
"""Layers of a kind that are built: those that follow are like the second, and would only take time."""

Built = TypeVar("Built")
AnyBlock = TypeVar("AnyBlock", bound=Block)


def divides(where: str, divisor: int, channels: Sequence[int], findings: Findings) -> bool:
    bad = [count for count in channels if count % divisor]
    if bad:
        findings.refuse(
            where,
            f"{divisor} does not divide {listed(dict.fromkeys(bad))} (block_out_channels); give a divisor of all,"
            f" such as {math.gcd(divisor, *channels)}, or other channels",
        )
    return not bad


def check_groups(where: str, groups: int, channels: Sequence[int], side: int, findings: Findings) -> None:
    """That no group of a normalisation is a single value, which PyTorch refuses where a batch is one sample.

    `side` is of the finest resolution. A block takes its channels from the resolution before.
    """
    for level, count in enumerate(channels):
        if side == 1 and groups in {count, channels[max(0, level - 1)]}:
            findings.refuse(
                where,
                f"{groups}, but at resolution {level + 1} of {len(channels)} (block_out_channels) images are 1 pixel"
                f" high and wide, so that each of {groups} channels is a group of one value, which can't be normalised:"
                " give fewer groups, fewer block_out_channels, or a larger acquire.image.size_px",
            )
            return
        side = -(-side // 2)


def made(where: str, block: AnyBlock, make: Callable[[AnyBlock], Built], findings: Findings) -> Built | None:
    """What `make` makes of the block. A field that it refuses is told, and set to its default to find the next one."""
    sound = True
    for _ in type(block).model_fields:
        try:
            made = make(block)
        except ConfigError as error:
            sound = False
            field = _field_of(str(error), block)
            findings.refuse(f"{where}.{field}" if field else where, _without(str(error), field))
            if not field or type(block).model_fields[field].is_required():
                return None
            block = block.model_copy(update={field: type(block).model_fields[field].get_default()})
        else:
            return made if sound else None
    return None


def told(
    where: str, make: Callable[[], Built], findings: Findings, fields: dict[str, str] | None = None
) -> Built | None:
    """What `make` makes. `fields`: other places than `where`, by the word that an error about them begins with."""
    try:
        return make()
    except ConfigError as error:
        field = str(error).partition(" ")[0]
        place = (fields or {}).get(field)
        findings.refuse(place or where, _without(str(error), field) if place else str(error))
    return None


def build(where: str, network: Callable[[], nn.Module], findings: Findings) -> None:
    try:
        with torch.device("meta"):
            network()
    except (ValueError, RuntimeError, OverflowError) as error:
        findings.refuse(where, f"there is no such network ({error}); change its numbers")


def _field_of(message: str, block: Block) -> str:
    """The field that an error's message begins with; none if it begins with another word."""
    found = re.match(r"\w+", message)
    return found.group() if found and found.group() in type(block).model_fields else ""


def _without(message: str, field: str) -> str:
    """The message without "field = ", which the path says, and with true and false as YAML has them."""
    message = message.removeprefix(f"{field} = ")
    first, space, rest = message.partition(" ")
    return (json.dumps(first == "True") if first in {"True", "False"} else first) + space + rest
