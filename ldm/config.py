"""Network configurations from and to the config.json of diffusers.

A network's frozen dataclass names the keys it understands. Every other key of a file is either of no consequence,
or has to have the one value that this library computes, or is refused: a network is never built that would silently
compute something else than its file says.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from types import UnionType
from typing import Any, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from ldm.errors import ConfigError

T = TypeVar("T")

MOST_WIDE, MOST_LAYERS, MOST_BLOCKS = 1 << 20, 256, 16
"""Bounds far above any network's, so that a damaged file is told of, and not allocated."""


@dataclasses.dataclass(frozen=True)
class NetworkConfig(ABC):
    """Base of the configurations: subclasses add fields named after diffusers' keys, and what they know of the rest."""

    def __post_init__(self) -> None:
        """Raises `ConfigError` for numbers that are NaN or infinite; subclasses check what their fields mean."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for entry in value if isinstance(value, tuple) else (value,):
                if isinstance(entry, float) and not math.isfinite(entry):
                    raise ConfigError(f"{field.name} = {_lists(value)!r}: must be of finite numbers")

    @classmethod
    @abstractmethod
    def class_name(cls) -> str:
        """`_class_name` in the file: the diffusers class of the same computation."""

    @classmethod
    @abstractmethod
    def only_values(cls) -> Mapping[str, Collection[Any]]:
        """Keys that would change the computation, with the values for which it is the one done here."""

    @classmethod
    @abstractmethod
    def without_effect(cls) -> Collection[str]:
        """Keys that leave the computation as it is."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that a config.json holds.

        Raises `ConfigError` for another class's file, for values of a wrong type, and for keys or values that stand for
        another computation.
        """
        found = values.get("_class_name", cls.class_name())
        if found != cls.class_name():
            raise ConfigError(
                f"_class_name is {found!r}, expected {cls.class_name()!r}: this is another network's file"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        kinds = get_type_hints(cls)
        known: dict[str, Any] = {}
        for key, value in values.items():
            if key in names:
                known[key] = _tuples(value)
                if not is_of(known[key], kinds[key]):
                    raise ConfigError(f"{cls.class_name()}: {key} = {value!r}: must be of type {kind_name(kinds[key])}")
            elif key in cls.only_values():
                allowed = cls.only_values()[key]
                if _tuples(value) not in allowed:
                    raise ConfigError(
                        f"{cls.class_name()}: {key} = {value!r} is not supported, only {_listed(allowed)}"
                    )
            elif not (key.startswith("_") or key in cls.without_effect() or value is None):
                raise ConfigError(f"{cls.class_name()}: {key} = {value!r} is not a key that is understood here")
        return cls(**known)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: the class's name and all fields."""
        return {"_class_name": self.class_name()} | {
            field.name: _lists(getattr(self, field.name)) for field in dataclasses.fields(self)
        }


def is_of(value: Any, kind: Any) -> bool:
    """Whether a value from JSON, its lists made tuples, is what the annotation `kind` asks for."""
    if get_origin(kind) in (Union, UnionType):
        return any(is_of(value, each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_of(item, get_args(kind)[0]) for item in value)
    if kind in (int, float):  # bool is an int in Python
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, kind)


def kind_name(kind: Any) -> str:
    """An annotation as it is written."""
    return kind.__name__ if isinstance(kind, type) else str(kind)


def per_block(value: T | tuple[T, ...], blocks: int, name: str) -> tuple[T, ...]:
    """`value` for each of the `blocks` resolutions: itself if it is a tuple of that length.

    Raises `ConfigError` if it is a tuple of another length.
    """
    if not isinstance(value, tuple):
        return (value,) * blocks
    if len(value) != blocks:
        raise ConfigError(f"{name} has {len(value)} entries, block_out_channels has {blocks}: give one for each")
    return value


def check_positive(config: NetworkConfig, names: Collection[str], most: int = MOST_WIDE) -> None:
    """Raises `ConfigError` unless each of the fields is a whole number from 1 to `most`, or a tuple of such."""
    for name in names:
        value = getattr(config, name)
        for entry in value if isinstance(value, tuple) else (value,):
            if not isinstance(entry, int) or entry < 1:
                raise ConfigError(f"{name} = {_lists(value)!r}: must be of whole numbers above zero")
            if entry > most:
                raise ConfigError(f"{name} = {_lists(value)!r}: must be of numbers up to {most}")


def check_blocks(channels: tuple[int, ...]) -> None:
    """Raises `ConfigError` unless there is at least one resolution, and no more than 16."""
    if not channels:
        raise ConfigError("block_out_channels is empty: give the channels of at least one resolution")
    if len(channels) > MOST_BLOCKS:
        raise ConfigError(f"block_out_channels has {len(channels)} entries: give up to {MOST_BLOCKS} resolutions")


def check_groups(channels: Collection[int], groups: int) -> None:
    """Raises `ConfigError` unless group normalisation can divide each of `channels`."""
    bad = [count for count in channels if count % groups]
    if bad:
        raise ConfigError(f"norm_num_groups = {groups} does not divide {_listed(bad)} channels")


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _lists(value: Any) -> Any:
    return [_lists(item) for item in value] if isinstance(value, tuple) else value


def _listed(values: Collection[Any]) -> str:
    return ", ".join(repr(value) for value in values)
