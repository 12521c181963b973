"""A folder of images: its files with their captions, known by their content, and read where they lie."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from infra.storage import StorageError, Store
from pipelines.acquire.captions import folder_table
from pipelines.acquire.folder import FOLDER_RULES, SCHEME, Folder, FolderReader
from pipelines.acquire.origin import Origin, Reader
from pipelines.acquire.rows import Row
from pipelines.acquire.sources.base import Known, SourceRows, told
from pipelines.acquire.tables import rows_digest
from pipelines.artifacts import Artifact, ArtifactError
from pipelines.dataset.errors import DatasetError
from pipelines.dataset.ledgers import read_ledger
from pipelines.recipe import Fetch, FolderSource
from pipelines.recipe.problems import Findings
from pipelines.recipe.sources import FILE_HASH, Beside

COMPARED = ("url", "caption", FILE_HASH)


class FolderRows(SourceRows[FolderSource]):
    """A row for each image, and for each line of metadata. Every file is read once to know its content."""

    noun = "files"

    def lists(self) -> Iterator[Iterator[Any]]:
        yield iter([folder_table(self.block)])

    def identity(self) -> tuple[Known, Known]:
        """The content of the files and their captions, wherever the folder lies."""
        known = {"kind": "folder", "captions": self.block.captions, "rows": rows_digest(folder_table(self.block))}
        return known, {name: value for name, value in self.settings().items() if name != "path"} | known

    def rules(self, fetch: Fetch) -> Known:
        """Nothing of the web."""
        return {name: value for name, value in fetch.content().items() if name in FOLDER_RULES}

    def origin(self) -> Origin:
        return Files(Folder(self.block.path).location)

    def check_here(self, where: str, beside: Beside, to_do: bool, findings: Findings) -> None:  # noqa: ARG002
        """That store and state don't lie in it, however their paths are written."""
        self.block.check_own_folders(where, beside, findings, _real_path)

    def changes(self, latest: Artifact, store: Store, settings: Mapping[str, Any] | None) -> str | None:  # noqa: ARG002
        """What has changed, by the ledgers of `latest`, whose files are compared with those of today."""
        try:
            tables = [read_ledger(unit, store, COMPARED).to_pylist() for unit in latest.units]
        except (FileNotFoundError, StorageError, ArtifactError, DatasetError):
            return None
        old, new = _by_file(row for table in tables for row in table), _by_file(folder_table(self.block).to_pylist())
        both = [name for name in new if name in old]
        changed = [name for name in both if old[name][0] != new[name][0]]
        captions = [name for name in both if old[name][0] == new[name][0] and old[name][1] != new[name][1]]
        return told(
            (f"{len(changed)} of {len(new)} files changed", changed),
            (f"captions of {len(captions)} changed", captions),
            (f"{len(new) - len(both)} added", [name for name in new if name not in old]),
            (f"{len(old) - len(both)} removed", [name for name in old if name not in new]),
        )


@dataclass(frozen=True)
class Files:
    """The files of a folder, at a path that every worker understands."""

    location: str
    is_web: bool = False

    def reader(self, rows: Sequence[Row], rules: Fetch, sleep: Callable[[float], Any]) -> Reader:  # noqa: ARG002
        """Reads files, and notices what isn't as it was when the folder was listed. Raises `SourceError`."""
        return FolderReader(Folder(self.location), {row["url"]: row[FILE_HASH] for row in rows}, rules)


def _real_path(text: str) -> str:
    """A path as the machine has it; URLs stay as they are."""
    return text if "://" in text or "::" in text else os.path.realpath(os.path.expanduser(text))  # noqa: PTH111


def _by_file(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str | None, list[str]]]:
    """Hash and captions of each file, by its path seen from the folder, in order."""
    found: dict[str, tuple[str | None, list[str]]] = {}
    for row in rows:
        name = unquote(row["url"].removeprefix(SCHEME), errors="replace")
        found.setdefault(name, (row[FILE_HASH], []))[1].append(row["caption"] or "")
    return {name: (sha256, sorted(captions)) for name, (sha256, captions) in sorted(found.items())}
