"""What a run would do and why, and how each node stands: read from manifests alone.

Starts nothing: no Ray, no Dagster, no MLflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.storage import FileDamaged, Store
from pipelines.again import Why, asked_again
from pipelines.artifacts import ANSWER, Artifact, Damaged, find, load, read_sealed, sealed
from pipelines.results import Row
from pipelines.workflow.node import Node

MISSING = object()
LATEST = {"key": str, "revision": str}
AGAIN: dict[Why, str] = {
    "force": "asked for with --force",
    "retry": "asked for with --retry",
    "repair": "files are missing or damaged: to be repaired",
}


@dataclass(frozen=True)
class Demand:
    """A node is to be made again: all of it, or its rows with these `reasons`."""

    why: Why
    reasons: tuple[str, ...] = ()
    num_rows: int | None = None
    """How many rows that are, where it is known."""

    @property
    def words(self) -> str:
        """ "asked for with --retry timeout,server_error: 33 rows"."""
        words = " ".join(filter(None, (AGAIN[self.why], ",".join(self.reasons))))
        return words if self.num_rows is None else f"{words}: {self.num_rows:,} rows"


def plan(
    nodes: Mapping[str, Node], store: Store, recipe_name: str, demands: Mapping[str, Demand] | None = None
) -> list[Row]:
    """One row a node, in order; as if `demands`, by node, had been asked for.

    A node behind one that is to do waits: whether it must run shows when its input's revision is known.
    """
    rows: list[Row] = []
    found: dict[str, Artifact] = {}
    for node in nodes.values():
        demand = (demands or {}).get(node.name)
        open_inputs = [name for name in node.inputs if name not in found]
        if open_inputs:
            why = f"after {', '.join(open_inputs)}" + (f"; {demand.words}" if demand else "")
            rows.append(Row(node.name, "waiting", why))
            continue
        key = node.key(found)
        artifact = None if demand else find(store, node.name, key)
        if artifact is None:
            why = demand.words if demand else _why(node, found, store, recipe_name, key)
            rows.append(Row(node.name, "to do", why, key))
        else:
            found[node.name] = artifact
            rows.append(Row(node.name, "up to date", f"revision {artifact.revision[:12]}", key, artifact))
    return rows


def remember(store: Store, recipe_name: str, node: str, artifact: Artifact) -> None:
    """Note the artifact as the node's latest in this recipe, for the reasons that the next plan gives."""
    latest = {"key": artifact.key, "revision": artifact.revision}
    if _latest(store, recipe_name, node) != latest:
        store.publish_bytes(latest_path(recipe_name, node), sealed(latest))


def newest(store: Store, recipe_name: str, node: str) -> Artifact | None:
    """What a run of the recipe published or found last as this node's, whatever settings it had; None if there is none.

    Raises `ArtifactError` if it is damaged.
    """
    latest = _latest(store, recipe_name, node)
    if latest is None:
        return None
    return find(store, node, latest["key"]) or load(store, node, latest["revision"], latest["key"])


def _latest(store: Store, recipe_name: str, node: str) -> dict[str, Any] | None:
    try:
        value = read_sealed(store, latest_path(recipe_name, node), LATEST)
    except (FileNotFoundError, Damaged, FileDamaged):
        return None
    return {name: value[name] for name in ("key", "revision")}


def latest_path(recipe_name: str, node: str) -> str:
    """Where it lies what the node had last in a recipe."""
    return f"recipes/{recipe_name}/{node}.json"


def _answer_path(node: str, key: str) -> str:
    return f"{node}/keys/{key}.json"


def _why(node: Node, inputs: Mapping[str, Artifact], store: Store, recipe_name: str, key: str) -> str:
    again = asked_again(store, node.name, key)
    if again is not None:
        return Demand(again.why, again.reasons).words
    if store.exists(_answer_path(node.name, key)):
        return "its manifest is missing or damaged"
    latest = _latest(store, recipe_name, node.name)
    try:
        before = read_sealed(store, _answer_path(node.name, latest["key"]), ANSWER) if latest else None
    except (FileNotFoundError, Damaged, FileDamaged):
        before = None
    return "not made yet" if before is None else _changes(node, inputs, before)


def _changes(node: Node, inputs: Mapping[str, Artifact], before: Mapping[str, Any]) -> str:
    """How what is asked for differs from what was `before`: an answer, as `pipelines.building` publishes it."""
    if before["format_version"] != node.format_version:
        return f"format version {before['format_version']} -> {node.format_version}"
    contents = (before["content"], node.identity.content)
    settings = (before["spec"], node.identity.settings)
    changes = [
        _change(place, *settings) for path in _differences(*contents) for place in _places(path, contents, settings)
    ]
    changes += [f"new {name}" for name in node.inputs if before["inputs"].get(name) != inputs[name].revision]
    return f"changed: {_several(changes)}" if changes else "not made yet"


def _places(path: str, contents: tuple[Any, Any], settings: tuple[Any, Any]) -> list[str]:
    """Where at or below `path` settings differ. Neutral blocks are in no content, manners in none ever."""
    below = [".".join(filter(None, (path, rest))) for rest in _differences(*(_at(each, path) for each in settings))]
    return [place for place in below if any(_at(content, place) is not MISSING for content in contents)] or [path]


def _several(changes: Sequence[str]) -> str:
    return ", ".join(changes[:6]) + (" ..." if len(changes) > 6 else "")


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Dotted paths at which two contents differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            child = f"{path}.{name}" if path else name
            if name not in old or name not in new:
                yield child
            else:
                yield from _differences(old[name], new[name], child)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{path}.{index}")
    elif old != new:
        yield path


def _change(path: str, old: Any, new: Any) -> str:
    """ "train.steps 500 -> 600", by the settings in full: a neutral value is in no content."""
    before, after = (_at(settings, path) for settings in (old, new))
    if before is MISSING or after is MISSING:
        return f"{path} {'added' if before is MISSING else 'removed'}"
    return f"{path} {_short(before)} -> {_short(after)}"


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return MISSING
    return value


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:21] + "..."
