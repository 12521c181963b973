"""Changes of a source since it was acquired, in words for people: which lists, or which files of a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from infra.storage import StorageError, Store
from pipelines.acquire.captions import HASH_COLUMN, folder_table
from pipelines.acquire.folder import SCHEME
from pipelines.acquire.plan import source_identity
from pipelines.artifacts import Artifact, ArtifactError
from pipelines.dataset.errors import DatasetError
from pipelines.dataset.ledgers import read_ledger
from pipelines.recipe import FolderSource, Source, UrlsSource

SHOWN = 3
"""Names that are given; of the others, their number."""
COLUMNS = ("url", "caption", HASH_COLUMN)


def source_changes(
    latest: Artifact, source: Source, store: Store, settings: Mapping[str, Any] | None = None
) -> str | None:
    """ "1 of 290 files changed: animals/abalone.png", or "1 of 3 lists changed: b.csv; 1 added: c.csv".

    `settings` are `identity(...).settings["source"]`, where that is known already. Of a folder, the ledgers of `latest`
    are read. None if nothing has changed that could be named: the kind of source or its settings have, which speak for
    themselves, or what was acquired can't be read. Raises `SourceError`.
    """
    known: Mapping[str, Any] = latest.settings.get("source", {})
    if known.get("kind") != source.kind:
        return None
    if isinstance(source, FolderSource):
        return _files(latest, source, store)
    if isinstance(source, UrlsSource):
        return _lists(known, source_identity(source)[1] if settings is None else settings)
    return None


def _files(latest: Artifact, source: FolderSource, store: Store) -> str | None:
    try:
        tables = [read_ledger(unit, store, COLUMNS).to_pylist() for unit in latest.units]
    except (FileNotFoundError, StorageError, ArtifactError, DatasetError):
        return None
    old, new = _by_file(row for table in tables for row in table), _by_file(folder_table(source).to_pylist())
    both = [name for name in new if name in old]
    changed = [name for name in both if old[name][0] != new[name][0]]
    captions = [name for name in both if old[name][0] == new[name][0] and old[name][1] != new[name][1]]
    return _said(
        (f"{len(changed)} of {len(new)} files changed", changed),
        (f"captions of {len(captions)} changed", captions),
        (f"{len(new) - len(both)} added", [name for name in new if name not in old]),
        (f"{len(old) - len(both)} removed", [name for name in old if name not in new]),
    )


def _by_file(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str | None, list[str]]]:
    """Hash and captions of each file, by its path seen from the folder, in order."""
    found: dict[str, tuple[str | None, list[str]]] = {}
    for row in rows:
        name = unquote(row["url"].removeprefix(SCHEME), errors="replace")
        found.setdefault(name, (row[HASH_COLUMN], []))[1].append(row["caption"] or "")
    return {name: (sha256, sorted(captions)) for name, (sha256, captions) in sorted(found.items())}


def _lists(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """By the fingerprints: a list that was moved or renamed is what it was."""
    before, after = (list(zip(known.get("names", []), known.get("files", []), strict=False)) for known in (old, new))
    gone = [name for name, sum_ in before if sum_ not in new["files"]]
    came = [name for name, sum_ in after if sum_ not in old.get("files", [])]
    changed = [name for name in came if name in gone]
    said = _said(
        (f"{len(changed)} of {len(after)} lists changed", changed),
        (f"{len(came) - len(changed)} added", [name for name in came if name not in gone]),
        (f"{len(gone) - len(changed)} removed", [name for name in gone if name not in came]),
    )
    if said is None and old.get("files") != new["files"]:
        return "the lists are given in another order, or another number of times"
    return said


def _said(*parts: tuple[str, Sequence[str]]) -> str | None:
    return "; ".join(f"{what}: {_shown(names)}" for what, names in parts if names) or None


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
