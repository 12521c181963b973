"""What a run would do and why, and how each node stands: read from manifests alone.

Starts nothing: no Ray, no Dagster, no MLflow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from infra.storage import Store
from pipelines.artifacts import Artifact, ArtifactError, find, load
from pipelines.building import asked_again
from pipelines.results import Row
from pipelines.workflow.graph import Node

MISSING = object()
AGAIN = {
    "force": "asked for with --force",
    "retry": "asked for with --retry",
    "repair": "files are missing or damaged: to be repaired",
}


def plan(nodes: Mapping[str, Node], store: Store, recipe_name: str) -> list[Row]:
    """One row a node, in order.

    A node behind one that is to do waits: whether it must run shows when its input's revision is known.
    """
    rows: list[Row] = []
    found: dict[str, Artifact] = {}
    for node in nodes.values():
        open_inputs = [name for name in node.inputs if name not in found]
        if open_inputs:
            rows.append(Row(node.name, "waiting", f"after {', '.join(open_inputs)}"))
            continue
        key = node.key(found)
        artifact = find(store, node.name, key)
        if artifact is None:
            rows.append(Row(node.name, "to do", _why(node, found, store, recipe_name, key), key))
        else:
            found[node.name] = artifact
            rows.append(Row(node.name, "up to date", f"revision {artifact.revision[:12]}", key, artifact))
    return rows


def remember(store: Store, recipe_name: str, node: str, artifact: Artifact) -> None:
    """Note the artifact as the node's latest in this recipe, for the reasons that the next plan gives."""
    path = _latest_path(recipe_name, node)
    with contextlib.suppress(FileNotFoundError):
        if store.read_json(path).get("key") == artifact.key:
            return
    store.publish_bytes(path, f'{{"key": "{artifact.key}", "revision": "{artifact.revision}"}}\n'.encode())


def _latest_path(recipe_name: str, node: str) -> str:
    return f"recipes/{recipe_name}/{node}.json"


def _why(node: Node, inputs: Mapping[str, Artifact], store: Store, recipe_name: str, key: str) -> str:
    again = asked_again(store, node.name, key)
    if again is not None:
        return AGAIN[again.why] + (f" {','.join(again.reasons)}" if again.reasons else "")
    if not store.exists(_latest_path(recipe_name, node.name)):
        return "not made yet"
    try:
        latest = load(store, node.name, store.read_json(_latest_path(recipe_name, node.name))["revision"]).manifest
    except (ArtifactError, FileNotFoundError):
        return "its manifest is missing or damaged"
    if latest["format_version"] != node.format_version:
        return f"format version {latest['format_version']} -> {node.format_version}"
    places = [*_differences(latest.get("content", {}), node.identity.content)]
    changes = [_change(place, latest["spec"], node.identity.settings) for place in places]
    changes += [f"new {name}" for name in node.inputs if latest["inputs"].get(name) != inputs[name].revision]
    return "changed: " + ", ".join(changes[:6]) + (" ..." if len(changes) > 6 else "") if changes else "not made yet"


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
