"""Changes of a source since it was acquired, in words for people: which lists, or which files of a folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.storage import Store
from pipelines.acquire.sources import rows_of_source
from pipelines.artifacts import Artifact
from pipelines.recipe import Source


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
    return rows_of_source(source).changes(latest, store, settings)
