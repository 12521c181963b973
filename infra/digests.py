"""Size and hash of a published file, as they were recorded, and the comparison of a file with them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from infra.store_errors import FileDamaged


class RecordedFile(Protocol):
    """A file as it was recorded when it was published; any class with these attributes."""

    @property
    def name(self) -> str:
        """The file's path in the folder that it was published in."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def sha256(self) -> str: ...


def sha256_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def check(file: Path, location: str, size_bytes: int | None, sha256: str | None = None) -> None:
    """Raises `FileDamaged`, which names `location`, if `file` is not what was recorded; None is not compared."""
    found_bytes = file.stat().st_size
    if size_bytes is not None and found_bytes != size_bytes:
        raise _damaged(location, f"{found_bytes} bytes", f"{size_bytes} bytes")
    if sha256 is not None and (found := sha256_of(file)) != sha256:
        raise _damaged(location, f"sha256 {found}", f"sha256 {sha256}")


def _damaged(location: str, found: str, recorded: str) -> FileDamaged:
    return FileDamaged(
        f"{location} has {found}, but was published with {recorded}: it was damaged or replaced; have it made again,"
        " or bring the right file back"
    )
