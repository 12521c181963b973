"""What units and artifacts say of themselves beside their files (`info`), with its types: noted by the stage that makes
them, and read here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Protocol, Self, get_type_hints

from pipelines.dataset.errors import DatasetError


class Published(Protocol):
    """A unit or an artifact."""

    @property
    def stage(self) -> str: ...

    @property
    def key(self) -> str: ...

    @property
    def info(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Facts:
    """Names of fields are keys of `info`."""

    def info(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, published: Published) -> Self:
        """The facts of a unit or an artifact; what else it says is left out. Raises `DatasetError` if one is not
        there."""
        types = get_type_hints(cls)
        values = {field.name: published.info.get(field.name) for field in fields(cls)}
        for name, value in values.items():
            if type(value) is not types[name]:
                raise DatasetError(
                    f"{published.stage}/{published.key} says {name} {value!r} of itself, which is no"
                    f" {types[name].__name__}; make it again with `--force {published.stage}`"
                )
        return cls(**values)


@dataclass(frozen=True)
class RowFacts(Facts):
    """Facts of a unit that has a row for each of some pairs of a shard."""

    shard: str
    """Name of the shard."""
    content: str
    """What the unit was computed from, whatever rounding made of it: its base key."""
    made_with: str
    """Digest of what its rows were made with; rows of other units with the same one can be copied into it."""
    computed: int
    """Rows that were computed for it."""
    copied: int
    """Rows that were copied from earlier units."""


@dataclass(frozen=True)
class PartFacts(RowFacts):
    """Facts of a unit of `score`: one scorer's columns of one shard."""

    scorer: str
    """The recipe's name for it."""


@dataclass(frozen=True)
class SplitFacts(Facts):
    """Facts of a selection, or of the cache of one shard: pairs on each side of the split."""

    train: int
    held_out: int


@dataclass(frozen=True)
class SourceFacts:
    """Facts of a selection from several sources: what of one of them was selected, and its weight when it was."""

    weight: float
    pairs: int
    """That were acquired."""
    train: int
    held_out: int


SOURCES = "sources"


def source_facts(selected: Published) -> dict[str, SourceFacts]:
    """Facts of each source, by its name; empty if the recipe had but one `source`."""
    return {name: SourceFacts(**facts) for name, facts in selected.info.get(SOURCES, {}).items()}


@dataclass(frozen=True)
class CacheFacts(SplitFacts, RowFacts):
    """Facts of a unit of `encode.<model>`: the selected pairs of one shard."""

    captions_cut: int
    """Captions with more tokens than the cache holds."""


@dataclass(frozen=True)
class NullFacts:
    """Facts of the unit of `encode.<model>` that holds the empty prompt's states, and no pair."""

    content: str
    null: Literal[True] = True

    def info(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def is_null(unit: Published) -> bool:
    """Whether a unit of `encode.<model>` holds the empty prompt's states, and no pair."""
    return bool(unit.info.get("null"))
