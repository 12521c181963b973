"""A folder of images as a source: its block, its columns, its checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa

from pipelines.recipe.block import Name
from pipelines.recipe.places import check_scheme, is_seen_within
from pipelines.recipe.problems import Findings, shown
from pipelines.recipe.sources.base import FILE_HASH, Beside, SourceBlock, check_kept

WEB = ("http", "https")


class FolderSource(SourceBlock):
    """A folder of images with captions. Hidden files and folders (names that begin with a dot) are passed over.

    Each file is read where it lies, twice: to know its content, and to make its shard. A local folder must be there on
    every machine of the cluster. Of `acquire.fetch`, `max_bytes` and `max_pixels` apply.
    """

    kind: Literal["folder"]
    """Kind of the source: a folder of images."""
    path: Name
    """Folder of the images: a local path or an fsspec URL, but not on the web, which `kind: urls` is for. Its name is
    no part of what is made: a copy elsewhere is the same source."""
    captions: Literal["sidecar", "filename", "metadata"] = "sidecar"
    """Place of the captions. sidecar is a text file beside each image, cat.txt for cat.png; filename takes
    red-apple_02.png for "red apple"; metadata is a metadata.csv or metadata.jsonl in the folder, as Hugging Face's
    ImageFolder has it, where a file may have many rows."""
    recursive: bool = True
    """Whether images in the folders below are taken too."""
    file_name_column: Name = "file_name"
    """Column of the metadata that says where an image lies, seen from the folder; it goes with `captions: metadata`
    alone."""
    text_column: Name = "text"
    """Column of the metadata that holds the captions; it goes with `captions: metadata` alone."""
    keep_columns: tuple[Name, ...] = ()
    """Further columns of the metadata to carry into the ledger, as text, where `select` can use them; they go with
    `captions: metadata` alone."""

    def columns(self) -> Sequence[Any]:
        return [pa.field(name, pa.string()) for name in dict.fromkeys((*self.keep_columns, FILE_HASH))]

    def check(self, where: str, beside: Beside, findings: Findings) -> None:
        if any(urlsplit(part).scheme in WEB for part in self.path.split("::")):
            findings.refuse(f"{where}.path", f"{self.path} is on the web; list the URLs of its images, with kind: urls")
        else:
            check_scheme(f"{where}.path", self.path, findings)
        if self.captions != "metadata":
            self._check_unused(where, findings)
        elif self.file_name_column == self.text_column:
            findings.refuse(
                f"{where}.text_column", f"{self.text_column!r} is file_name_column too; a file's name is no caption"
            )
        self.check_own_folders(where, beside, findings)
        check_kept(where, self.keep_columns, findings, {FILE_HASH: ...})

    def check_own_folders(
        self, where: str, beside: Beside, findings: Findings, whole: Callable[[str], str] = str
    ) -> None:
        """That no picture which is made here is taken for one of the source's by the next run.

        `whole` makes paths comparable that are written in different ways.
        """
        if self.captions == "metadata" or not self.recursive:
            return
        for key, place in (("store", beside.store), ("state_dir", beside.state_dir)):
            if is_seen_within(whole(place), whole(self.path)):
                findings.refuse(
                    key,
                    f"{place!r} lies in {where}.path {self.path!r}: the pictures that are published there would be"
                    f" taken for images of the source; name a folder elsewhere, or set {where}.recursive to false",
                )

    def _check_unused(self, where: str, findings: Findings) -> None:
        for key in ("keep_columns", "file_name_column", "text_column"):
            if getattr(self, key) != type(self).model_fields[key].default:
                findings.refuse(
                    f"{where}.{key}",
                    f"{shown(getattr(self, key))} is about columns of metadata, but captions is {self.captions!r}:"
                    " set captions to metadata, or leave this out",
                )
