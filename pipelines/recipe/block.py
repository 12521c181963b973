"""What all blocks of a recipe have in common, and which of their fields decide over what comes out.

A field is *content*, which changes what comes out, or a *manner*, which says how it is come by: how politely, how fast,
how often tried. Manners are marked at the field: `timeout_s: Annotated[PositiveFloat, MANNER] = 10.0`. Keys are made of
content alone, and leave out every field that is at its *neutral* value: its default, or what `Neutral` says. So a field
that is added later, off by default, changes no key. A default can be changed only together with `Neutral(the old one)`,
or two recipes that ask for different things would have one key; a test holds all neutral values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]

MOST = 2**53
"""Above every whole number of a recipe: floats, JSON and the generators of random numbers hold all below it exactly."""
Count = Annotated[int, Field(ge=1, lt=MOST)]
Whole = Annotated[int, Field(ge=0, lt=MOST)]
Name = Annotated[str, Field(min_length=1)]
"""Name of a column, a file or a folder."""


@dataclass(frozen=True)
class Manner:
    """Marks a field that is no part of any key."""


MANNER = Manner()


@dataclass(frozen=True)
class Neutral:
    """Marks a field whose value that keys leave out is not its default."""

    value: Any


class Block(BaseModel):
    """A block of the recipe: unknown keys are refused, values are of the type that is asked for and never change.

    What is said at a field (type, range, choices) is of that field alone. How fields go together is `checks`' matter.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def content(self, *, exclude: frozenset[str] = frozenset()) -> dict[str, Any]:
        """What of this block decides over a result, as JSON values: no manners, nothing at its neutral value.

        `exclude` are fields of this block that another node's result depends on.
        """
        found: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if name in exclude or is_manner(field):
                continue
            value = _content(getattr(self, name))
            if has_neutral(field) and _canonical(value) == _canonical(_content(neutral(field))):
                continue
            found[name] = value
        return found


def is_manner(field: FieldInfo) -> bool:
    """Whether a field says how, and not what."""
    return any(isinstance(entry, Manner) for entry in field.metadata)


def has_neutral(field: FieldInfo) -> bool:
    """Whether there is a value at which a field is no part of a key; a field that must be given has none."""
    return not field.is_required() or any(isinstance(entry, Neutral) for entry in field.metadata)


def neutral(field: FieldInfo) -> Any:
    """The value at which a field is no part of a key."""
    for entry in field.metadata:
        if isinstance(entry, Neutral):
            return entry.value
    return field.get_default(call_default_factory=True)


def _content(value: Any) -> Any:
    """JSON values. Numbers that are equal are one: 1 and 1.0 ask for the same. True and 1 do not."""
    if isinstance(value, Block):
        return value.content()
    if isinstance(value, Mapping):
        return {str(name): _content(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_content(entry) for entry in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _canonical(value: Any) -> str:
    """Text that is equal for equal JSON values alone: to Python, 1 is True."""
    return json.dumps(value, sort_keys=True)
