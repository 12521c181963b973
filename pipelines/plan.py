"""What a run would do and why, and how each node stands: read from manifests alone.

Starts nothing: no Ray, no Dagster, no MLflow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from infra.storage import Store
from pipelines.artifacts import Artifact, ArtifactError, find, load
from pipelines.graph import Node

State = Literal["up to date", "to do", "waiting"]


@dataclass(frozen=True)
class Row:
    """How one node stands. `artifact` is there when it is up to date."""

    node: str
    state: State
    why: str
    key: str | None = None
    artifact: Artifact | None = None


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
    if store.exists(f"{node.name}/keys/{key}.rebuild"):
        return "asked for with --force"
    if not store.exists(_latest_path(recipe_name, node.name)):
        return "not made yet"
    try:
        latest = load(store, node.name, store.read_json(_latest_path(recipe_name, node.name))["revision"]).manifest
    except (ArtifactError, FileNotFoundError):
        return "its manifest is missing or damaged"
    if latest["format_version"] != node.format_version:
        return f"format version {latest['format_version']} -> {node.format_version}"
    changes = [*_differences(latest["spec"], node.identity)]
    changes += [f"new {name}" for name in node.inputs if latest["inputs"].get(name) != inputs[name].revision]
    return "changed: " + ", ".join(changes[:6]) + (" ..." if len(changes) > 6 else "") if changes else "not made yet"


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in sorted({*old, *new}):
            child = f"{path}.{name}" if path else name
            if name not in old or name not in new:
                yield f"{child} {'added' if name in new else 'removed'}"
            else:
                yield from _differences(old[name], new[name], child)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _differences(before, after, f"{path}.{index}")
    elif old != new:
        yield f"{path} {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:21] + "..."
