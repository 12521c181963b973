"""The scorers that there are, by name: what a recipe may ask of each, and which columns it gives a pair.

How the built-in ones work is the stage's matter (`pipelines.score.scorers`); one that is registered brings it along.
Nothing heavy is imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

import pyarrow as pa
from pydantic import Field

from pipelines.dataset.ledger import RESERVED_NAMES
from pipelines.dataset.ledgers import SHARD
from pipelines.recipe.block import Block
from pipelines.recipe.errors import RegistrationError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

NAME = re.compile(r"[a-z][a-z0-9_]*")
FEATURES = "features"
"""Of images: rows of numbers that lie beside the columns of scores."""


@dataclass(frozen=True)
class OfFiles:
    """Marks an option of a scorer that is the path of a file or a folder: its content, not the path, is in keys."""


WeightsPath = Annotated[str, Field(min_length=1), OfFiles()]
"""Type of an option that is the path of weights: a file or a folder."""


@dataclass(frozen=True)
class Column:
    """A column of scores: its Arrow type and, for numbers, the least and the greatest value there can be."""

    name: str
    type: Any
    least: float | None = None
    greatest: float | None = None
    told: bool = False
    """Whether the mean and percentiles over all pairs are among a run's figures."""

    @property
    def field(self) -> Any:
        """The column's Arrow field. No pair is without a score."""
        return pa.field(self.name, self.type, nullable=False)


@dataclass(frozen=True)
class Place:
    """Where a scorer computes: a device ("cpu", "cuda") and the threads it may use there."""

    device: str
    threads: int


class NoOptions(Block):
    """The options of a scorer that has none."""


Score = Callable[[Sequence[Any], Sequence[str]], Mapping[str, Sequence[Any]]]
"""(RGB images uint8 [h, w, 3], their captions) to the values of each column by its name, one a pair. A pair's values
are its own, whatever is scored with it."""


@dataclass(frozen=True)
class ScorerKind:
    """A scorer by name. `key`: that of `score` which switches a built-in one on; `score.scorers` has the others."""

    name: str
    columns: tuple[Column, ...]
    make: Callable[[Any, Place], Score] | None = None
    """Makes the scorer, from its options and a place, in the process that scores. None for those that are built in."""
    options: type[Block] = NoOptions
    reads_captions: bool = True
    """Whether its values depend on captions, or on images alone."""
    needs: tuple[str, ...] = ()
    """Modules that must be installed."""
    key: str = field(default="")

    @property
    def where(self) -> str:
        """The key of a recipe that asks for it."""
        return f"score.{self.key}" if self.key else f"score.scorers.{self.name}"


SCORERS: dict[str, ScorerKind] = {
    kind.name: kind
    for kind in (
        ScorerKind("clip", (Column("clip_similarity", pa.float32(), -1.0, 1.0, told=True),), key="clip"),
        ScorerKind("nsfw", (Column("nsfw", pa.float32(), 0.0, 1.0, told=True),), reads_captions=False, key="nsfw"),
        ScorerKind(
            "phash",
            (Column("phash", pa.uint64()), Column("thumbnail", pa.binary(192))),
            reads_captions=False,
            key="phash",
        ),
        ScorerKind(FEATURES, (), reads_captions=False, key=FEATURES),
    )
}
"""Scorers by name. `register_scorer` adds to them."""


def register_scorer(
    name: str,
    make: Callable[[Any, Place], Score],
    columns: Sequence[Column],
    *,
    options: type[Block] = NoOptions,
    reads_captions: bool = True,
    needs: Sequence[str] = (),
) -> None:
    """Make a scorer known as `score.scorers.NAME`; the parameters are those of `ScorerKind`.

    Raises `RegistrationError` for a name or a column that is taken or can't be one, and for a scorer without columns.
    """
    if not NAME.fullmatch(name):
        raise RegistrationError(f"scorer {name!r}: a name is lower-case letters, digits and _, beginning with a letter")
    if name in SCORERS:
        raise RegistrationError(f"scorer {name!r} is registered already: choose another name")
    if not columns:
        raise RegistrationError(f"scorer {name!r} has no columns; give one or more")
    if not (isinstance(options, type) and issubclass(options, Block)):
        raise RegistrationError(f"options of scorer {name!r} are {options!r}; give a subclass of Block")
    for option, info in options.model_fields.items():
        if _has_files(info.annotation) and not is_of_files(info):
            raise RegistrationError(
                f"option {option!r} of scorer {name!r} holds paths within {info.annotation}: their content would be in"
                " no key; give each path an option of its own, WeightsPath or WeightsPath | None"
            )
    given = [column.name for column in columns]
    for column in columns:
        taken = next((kind.name for kind in SCORERS.values() if column.name in _names(kind)), None)
        if taken is not None:
            raise RegistrationError(f"column {column.name!r} of scorer {name!r} is one of {taken!r}: rename it")
        if (
            not NAME.fullmatch(column.name)
            or column.name in RESERVED_NAMES | {SHARD.name, FEATURES}
            or given.count(column.name) > 1
        ):
            raise RegistrationError(
                f"column {column.name!r} of scorer {name!r}: must be lower-case letters, digits and _, there once, and"
                " none of the ledger's own"
            )
        if not isinstance(column.type, pa.DataType):
            raise RegistrationError(
                f"column {column.name!r} of scorer {name!r}: its type is an Arrow type, as pa.float32()"
            )
        is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        if not is_number and (column.told or column.least is not None or column.greatest is not None):
            raise RegistrationError(
                f"column {column.name!r} of scorer {name!r} is of type {column.type}: least, greatest and told are for"
                " numbers"
            )
    SCORERS[name] = ScorerKind(name, tuple(columns), make, options, reads_captions, tuple(needs))


def _names(kind: ScorerKind) -> set[str]:
    return {column.name for column in kind.columns}


def columns_by_name() -> dict[str, tuple[ScorerKind, Column]]:
    """Every column that a scorer may give, with the scorer."""
    return {column.name: (kind, column) for kind in SCORERS.values() for column in kind.columns}


def is_of_files(field: FieldInfo) -> bool:
    """Whether an option is the path of a file or a folder, or None."""
    entries = list(field.metadata)
    if get_origin(field.annotation) in (Union, UnionType):
        entries += [entry for part in get_args(field.annotation) for entry in getattr(part, "__metadata__", ())]
    return any(isinstance(entry, OfFiles) for entry in entries)


def _has_files(annotation: Any) -> bool:
    """Whether a path of files is anywhere within a type."""
    marked = any(isinstance(entry, OfFiles) for entry in getattr(annotation, "__metadata__", ()))
    return marked or any(_has_files(part) for part in get_args(annotation))
