"""What the sources of a recipe gave, read as one: a single artifact of `acquire`, or one of each `acquire.<source>`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from pipelines.artifacts import Artifact, Counts, Unit, digest
from pipelines.dataset.errors import DatasetError

ACQUIRE = "acquire"


class Shards(Protocol):
    """Shards with their ledgers: an artifact of `acquire`, or several as one."""

    @property
    def units(self) -> tuple[Unit, ...]: ...

    @property
    def counts(self) -> Counts: ...

    @property
    def revision(self) -> str: ...


@dataclass(frozen=True)
class Acquired:
    """The artifacts of all sources, by node, in the recipe's order."""

    artifacts: Mapping[str, Artifact]

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The shards of all sources. No two have one name, which is made of the source's too."""
        return tuple(unit for artifact in self.artifacts.values() for unit in artifact.units)

    @property
    def counts(self) -> Counts:
        """What became of the rows of all sources."""
        return sum((artifact.counts for artifact in self.artifacts.values()), Counts(0, 0))

    @property
    def revision(self) -> str:
        """Revision of the one artifact, or a hash of those of all, by the sources' names."""
        found = {name: artifact.revision for name, artifact in self.artifacts.items()}
        return next(iter(found.values())) if len(found) == 1 and ACQUIRE in found else digest(found)

    @property
    def sources(self) -> dict[str, Mapping[str, Any]]:
        """What each source was asked for, by its name; of a recipe's one `source` by ""."""
        return {source_name(node): artifact.settings.get("source", {}) for node, artifact in self.artifacts.items()}

    @property
    def settings(self) -> dict[str, Any]:
        """All settings: `acquire`, and `source` or, by name, `sources`."""
        known = self.sources
        how = next(iter(self.artifacts.values())).settings.get("acquire", {})
        return {"acquire": how} | ({"source": known[""]} if "" in known else {"sources": known})


def is_acquired(node: str) -> bool:
    """Whether a node's artifact is a source's pairs."""
    return node.partition(".")[0] == ACQUIRE


def acquired_of(inputs: Mapping[str, Artifact]) -> Acquired:
    """The pairs among a node's inputs. Raises `DatasetError` if there are none."""
    found = {name: artifact for name, artifact in inputs.items() if is_acquired(name)}
    if not found:
        raise DatasetError(f"nothing was acquired: the inputs are {', '.join(inputs) or 'none'}")
    return Acquired(found)


def source_name(node: str) -> str:
    """ "photos" for "acquire.photos", "" for "acquire"."""
    return node.partition(".")[2]


def source_of(unit: Unit) -> str:
    """Name of the source that a shard's rows came from; "" for a recipe's one `source`."""
    return source_name(unit.stage)
