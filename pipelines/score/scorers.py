"""The scorers that a recipe asks for, made: the built-in ones, each of a file beside this one, and registered ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from ldm.clip import Clip
from pipelines.dataset.scores import Identity
from pipelines.recipe import ScoreSpec
from pipelines.recipe.columns import asked_scorers
from pipelines.recipe.plugins import Plugin, error_of, plugin_of
from pipelines.recipe.registered import check_scorer, scorer_options
from pipelines.recipe.scorers import Column, Place, ScorerKind
from pipelines.score.errors import ScoreError
from pipelines.score.scorer import Pixels, Scorer


@dataclass(frozen=True)
class Making:
    """What scorers are made with. `keys`: what those of `score.scorers` are in keys, by name."""

    spec: ScoreSpec
    place: Place
    load_clip: Callable[[], Clip]
    keys: Mapping[str, Any]
    features_sha256: str | None


def _clip(making: Making) -> Scorer:
    from pipelines.score.clip import ClipSimilarity

    return ClipSimilarity(making.load_clip)


def _nsfw(making: Making) -> Scorer:
    from pipelines.score.nsfw import OpenNsfw

    return OpenNsfw(making.place.threads)


def _phash(_: Making) -> Scorer:
    from pipelines.score.phash import PerceptualHash

    return PerceptualHash()


def _features(making: Making) -> Scorer:
    from pipelines.score.features import ImageFeatures

    assert making.spec.features is not None
    return ImageFeatures(making.spec.features, making.place.device, making.features_sha256)


BUILT_IN: dict[str, Callable[[Making], Scorer]] = {
    "clip": _clip,
    "nsfw": _nsfw,
    "phash": _phash,
    "features": _features,
}
"""Built-in scorers by the names that `pipelines.recipe.scorers.SCORERS` has."""


def make_scorers(making: Making) -> dict[str, Scorer]:
    """All that the recipe asks for, by name. Networks are loaded when they are first needed."""
    return {
        kind.name: BUILT_IN[kind.name](making) if kind.name in BUILT_IN else Registered(kind, making)
        for kind in asked_scorers(making.spec)
    }


class Registered:
    """A scorer that a plugin registered: what it says is held against the columns that it was registered with."""

    def __init__(self, kind: ScorerKind, making: Making) -> None:
        self._kind = kind
        self._making = making
        self._plugin: Plugin | None = plugin_of("scorer", kind.name)
        self.fields = tuple(column.field for column in kind.columns)
        self.reads_captions = kind.reads_captions

    @cached_property
    def identity(self) -> Identity:
        """The scorer's identity: its version is its options, as they are in keys; its hash is the plugin's."""
        key = dict(self._making.keys.get(self._kind.name, {}))
        key.pop("plugin_sha256", None)
        sha256 = "" if self._plugin is None else self._plugin.sha256
        return {"model": self._kind.name, "version": json.dumps(key, sort_keys=True) if key else "", "sha256": sha256}

    @cached_property
    def _score(self) -> Any:
        given = self._making.spec.scorers[self._kind.name]
        if self._kind.name in self._making.keys:
            check_scorer(self._kind.name, given, self._making.keys[self._kind.name])
        options = scorer_options(self._kind.name, given)
        assert self._kind.make is not None, "a scorer that is not built in is registered with what makes it"
        with self._told():
            return self._kind.make(options, self._making.place)

    def __call__(self, images: Sequence[Pixels], captions: Sequence[str]) -> Mapping[str, Any]:
        """Raises `ScoreError` if the plugin fails, or says what its columns can't hold."""
        score = self._score
        with self._told():
            values = score(images, captions)
        if not isinstance(values, Mapping):
            raise self._error(f"gives a {type(values).__name__}; a scorer gives the values of each column by its name")
        names = [column.name for column in self._kind.columns]
        if set(values) != set(names):
            raise self._error(f"gives {', '.join(map(str, values)) or 'nothing'}; its columns are {', '.join(names)}")
        return {column.name: self._checked(column, values[column.name], len(images)) for column in self._kind.columns}

    def _checked(self, column: Column, values: Any, count: int) -> Any:
        try:
            array = pa.array(list(values), column.type)
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise self._error(f"{column.name} is no column of {column.type}: {' '.join(str(error).split())}") from error
        if len(array) != count or array.null_count:
            raise self._error(f"{column.name}: {len(array) - array.null_count} values of {count} images; give one each")
        found = array.to_pylist()
        for value in found:
            low = column.least is not None and value < column.least
            if low or (column.greatest is not None and value > column.greatest):
                raise self._error(f"{column.name} is {value}, registered as {column.least} to {column.greatest}")
        return found

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What the plugin's own code raises, as one line that says where."""
        try:
            yield
        except Exception as error:  # the plugin's code may raise anything
            if self._plugin is None:
                raise
            raise ScoreError(f"{self._kind.where}: {error_of(self._plugin, error)}") from error

    def _error(self, message: str) -> ScoreError:
        of = "" if self._plugin is None else f" ({self._plugin.path})"
        return ScoreError(f"{self._kind.where}{of}: {message}")
