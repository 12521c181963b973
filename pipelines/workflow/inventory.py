"""What lies in a store's node folders, how large it is, and since when: from one listing a node."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from infra.storage import Store
from infra.store_errors import reading

STAGES = ("acquire", "score", "select", "report", "encode", "train", "evaluate", "release")
KEY = re.compile(r"[0-9a-f]{32}")


@dataclass
class Piece:
    """A folder or file that is kept or deleted as a whole."""

    size_bytes: int = 0
    modified_s: float = 0.0
    """When the newest file was written."""
    names: dict[str, float] = field(default_factory=dict)
    """When each of its files was written, by its path in the folder."""

    def add(self, name: str, size_bytes: int, modified_s: float) -> None:
        self.size_bytes += size_bytes
        self.modified_s = max(self.modified_s, modified_s)
        self.names[name] = modified_s


@dataclass
class Inventory:
    """The folder of one node: units, revisions and unfinished work by key, answers and what was begun by key."""

    node: str
    units: dict[str, Piece] = field(default_factory=dict)
    revisions: dict[str, Piece] = field(default_factory=dict)
    unfinished: dict[str, Piece] = field(default_factory=dict)
    answers: dict[str, Piece] = field(default_factory=dict)
    begun: dict[str, Piece] = field(default_factory=dict)
    continuable: dict[str, Piece] = field(default_factory=dict)
    """What leads to checkpoints of finished trainings, by path in the store."""
    parts: dict[str, Piece] = field(default_factory=dict)
    """Local files that were never finished, by path in the store."""


def node_folders(store: Store, nodes: Iterable[str]) -> list[str]:
    """The store's folders that are nodes': of `nodes`, or named as nodes are."""
    known = set(nodes)
    return [name for name in store.listdir("") if name in known or name.partition(".")[0] in STAGES]


def take_inventory(store: Store, node: str) -> Inventory:
    """Whatever isn't named as this project names it is left out, and so is never deleted."""
    found = Inventory(node)
    folders: Mapping[str, dict[str, Piece]] = {
        "units": found.units,
        "revisions": found.revisions,
        "unfinished": found.unfinished,
    }
    files: Mapping[str, dict[str, Piece]] = {"keys": found.answers, "begun": found.begun}
    for path, size_bytes, modified_s in _listing(store, node):
        kind, _, rest = path.partition("/")
        name, _, inner = rest.partition("/")
        if path.endswith(".part"):
            found.parts.setdefault(f"{node}/{path}", Piece()).add("", size_bytes, modified_s)
        elif kind in folders and KEY.fullmatch(name) and inner:
            folders[kind].setdefault(name, Piece()).add(inner, size_bytes, modified_s)
        elif kind in files and rest.endswith(".json") and not inner:
            files[kind].setdefault(name.removesuffix(".json"), Piece()).add("", size_bytes, modified_s)
        elif kind == "continuable" and rest.endswith(".json"):
            found.continuable.setdefault(f"{node}/{path}", Piece()).add("", size_bytes, modified_s)
    return found


def _listing(store: Store, folder: str) -> Iterator[tuple[str, int, float]]:
    """Path in the folder, size and time of writing (seconds since 1970) of each file."""
    with reading(store.location(folder)):
        if store.is_local:
            root = Path(store.location(folder))
            for parent, _, names in os.walk(root):
                for name in names:
                    path = Path(parent, name)
                    try:
                        stat = path.lstat()  # of a link itself, which may lead nowhere
                    except FileNotFoundError:
                        continue
                    yield path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime
            return
        fs, root_path = fsspec.core.url_to_fs(store.location(folder))
        fs.invalidate_cache()
        start = root_path.strip("/") + "/"
        for path_there, entry in fs.find(root_path, detail=True).items():
            name = path_there.lstrip("/")
            if name.startswith(start) and not name.endswith("/"):
                yield name.removeprefix(start), int(entry["size"]), _written_s(entry)


def _written_s(entry: Mapping[str, Any]) -> float:
    """By what drivers call it; the end of time, so that it is kept, where none says it."""
    for name in ("LastModified", "last_modified", "mtime", "updated", "modified", "created"):
        value = entry.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
    return float("inf")
