"""One shard, from rows to a published unit: img2dataset's Downloader with our fetcher, resizer and writer.

A plain function: what runs it, how many at once, and what to do if it dies, is the caller's matter. Nothing of it lies
outside a temporary folder until the unit is published.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from infra.storage import Store
from pipelines.acquire.captions import HASH_COLUMN
from pipelines.acquire.decode import Undecodable, open_picture
from pipelines.acquire.errors import ShardFailed
from pipelines.acquire.fetch import Fetcher, FetchResult
from pipelines.acquire.filter import judge_caption, judge_size
from pipelines.acquire.folder import Folder, FolderReader
from pipelines.acquire.resize import encode, fit, phash
from pipelines.acquire.scratch import scratch_folder
from pipelines.acquire.write import ShardWriter
from pipelines.artifacts import Unit, digest, file_sha256, find_unit
from pipelines.building import publish_unit
from pipelines.dataset.ledger import ErrorClass, Outcome, Reason, content_digest, count, ledger_schema
from pipelines.recipe import AcquireSpec

STAGE = "acquire"
SHARD_DIGITS = 5

_DOWNLOADER_LOCK = threading.Lock()

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs for one shard. `rows` has url, caption, uid and the source's further columns."""

    index: int
    unit_key: str
    rows: Any
    spec: AcquireSpec
    store: Store
    folder: str | None = None
    """Where the rows' files lie; None: on the web."""

    @property
    def name(self) -> str:
        return f"{self.index:0{SHARD_DIGITS}d}"


class _Body(io.BytesIO):
    """A fetched body that knows its row: what img2dataset carries from our fetcher to our resizer."""

    def __init__(self, row: int, data: bytes) -> None:
        super().__init__(data)
        self.row = row


@dataclass(frozen=True)
class _Image:
    """What the resizer learned of one image, and why it refused it."""

    mime: str | None = None
    orientation: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    phash: int | None = None
    reason: Reason | None = None


@dataclass
class _Notes:
    """What img2dataset has no place for, by row: kept until the row is written."""

    fetches: dict[int, FetchResult] = field(default_factory=dict)
    images: dict[int, _Image] = field(default_factory=dict)


def acquire_shard(task: ShardTask) -> Unit:
    """Download, filter, resize and publish one shard. Safe to call again, and from any process.

    Raises `ShardFailed` if a row is lost or a folder's file has changed, `SourceError` if the folder isn't there,
    `StorageError` or `OSError` if something can't be written.
    """
    started_s = time.monotonic()
    with scratch_folder() as scratch:
        tar_path, ledger_path = download(task, scratch)
        published = find_unit(task.store, STAGE, task.unit_key)
        if published is not None:  # another worker was thought dead, and was not
            return published
        ledger = pq.read_table(ledger_path)
        info = {
            "shard": task.index,
            "duration_s": round(time.monotonic() - started_s, 3),
            "content": digest([file_sha256(tar_path), content_digest(ledger)]),
        }
        files: dict[str, Path | bytes] = {path.name: path for path in (tar_path, ledger_path)}
        return publish_unit(task.store, STAGE, task.unit_key, files, count(ledger), info)


def download(task: ShardTask, folder: Path) -> tuple[Path, Path]:
    """Make the shard's tar and its ledger in `folder`, and nothing beyond; the paths of both.

    Raises as `acquire_shard` does.
    """
    downloader = import_downloader()
    cv2.setNumThreads(1)
    notes = _Notes()
    feather = folder / f"{task.name}.feather"
    with pa.OSFile(str(feather), "wb") as sink, pa.ipc.new_file(sink, task.rows.schema) as file:
        file.write_table(task.rows)
    spec, columns = task.spec, task.rows.schema.names
    writer = ShardWriter(
        folder, task.name, ledger_schema(task.rows.schema), spec.image.encode_format, task.rows.num_rows
    )
    key_digits = math.ceil(math.log10(spec.shard_size))
    first_key = int(downloader.compute_key(0, task.index, key_digits, SHARD_DIGITS))
    job = downloader.Downloader(
        sample_writer_class=_SampleWriter(writer, notes, task.index, first_key),
        resizer=_Resizer(spec, notes),
        thread_count=spec.fetch.threads,
        save_caption=True,
        extract_exif=False,
        output_folder=str(folder),
        column_list=columns,
        timeout=spec.fetch.timeout_s,
        number_sample_per_shard=spec.shard_size,
        oom_shard_count=SHARD_DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=spec.image.encode_format,
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )
    fetcher = _fetcher(task)
    fetch = _DownloadFunction(task.rows.column("caption").to_pylist(), spec, fetcher, notes)
    with _downloads_by(downloader, fetch):
        job.download_shard((task.index, str(feather)))
    if isinstance(fetcher, FolderReader):
        fetcher.check_unchanged()
    return writer.tar_path, writer.ledger_path


def _fetcher(task: ShardTask) -> Fetcher | FolderReader:
    if task.folder is None:
        return Fetcher(task.spec.fetch)
    hashes = zip(task.rows.column("url").to_pylist(), task.rows.column(HASH_COLUMN).to_pylist(), strict=True)
    return FolderReader(Folder(task.folder), dict(hashes), task.spec.fetch)


def import_downloader() -> Any:
    """img2dataset's module `downloader`, and what it needs of the package.

    The package's own `__init__` is its command line: it costs each worker three seconds, imports what is gone from
    Python 3.13, and one of the libraries it pulls in asks a server for its newest version. An empty package stands in
    for it while the module is imported, and is taken away again.
    """
    with _DOWNLOADER_LOCK:
        if "img2dataset" in sys.modules or "img2dataset.downloader" in sys.modules:
            return importlib.import_module("img2dataset.downloader")
        spec = importlib.util.find_spec("img2dataset")
        if spec is None or spec.submodule_search_locations is None:
            raise ShardFailed("img2dataset is not installed on the machine of a worker; install latentworks there")
        package = types.ModuleType("img2dataset")
        package.__path__ = spec.submodule_search_locations
        sys.modules["img2dataset"] = package
        try:
            return importlib.import_module("img2dataset.downloader")
        finally:
            del sys.modules["img2dataset"]


@contextlib.contextmanager
def _downloads_by(downloader: Any, fetch: Callable[..., Any]) -> Iterator[None]:
    """img2dataset looks its download function up in its module when it calls it: there we put ours."""
    with _DOWNLOADER_LOCK:
        theirs = downloader.download_image_with_retry
        downloader.download_image_with_retry = fetch
        try:
            yield
        finally:
            downloader.download_image_with_retry = theirs


@dataclass(frozen=True)
class _DownloadFunction:
    """img2dataset's `download_image_with_retry`, ours: (row, url) to (row, stream, error). Called from its threads."""

    captions: Sequence[str | None]
    spec: AcquireSpec
    fetcher: Fetcher | FolderReader
    notes: _Notes

    def __call__(self, row: tuple[int, str | None], **_theirs: object) -> tuple[int, _Body | None, str | None]:
        index, url = row
        reason = judge_caption(self.captions[index], self.spec.filter)
        if reason is not None:  # no request for what would be dropped anyway
            result = FetchResult(reason=reason, message=f"caption {self.captions[index]!r}: {reason}")
        else:
            result = self.fetcher.fetch(url or "")
        self.notes.fetches[index] = replace(result, body=None)
        if result.body is None:
            return index, None, result.message or str(result.reason)
        return index, _Body(index, result.body), None


@dataclass(frozen=True)
class _Resizer:
    """img2dataset's resizer, ours: (stream, boxes) to (bytes, width, height, original width and height, error)."""

    spec: AcquireSpec
    notes: _Notes

    def __call__(
        self, stream: _Body, _boxes: object = None
    ) -> tuple[bytes | None, int | None, int | None, int | None, int | None, str | None]:
        image = _Image()
        try:
            picture = open_picture(stream.getvalue(), self.spec.fetch.max_pixels)
            image = _Image(picture.mime, picture.orientation, picture.width, picture.height)
            reason = judge_size(picture.width, picture.height, self.spec.filter)
            if reason is not None:
                raise Undecodable(reason, f"{picture.width}x{picture.height}: {reason}")
            pixels = fit(picture.pixels(self._needed_px), self.spec.image)
            encoded = encode(pixels, self.spec.image)
            self.notes.images[stream.row] = replace(image, phash=phash(pixels))
        except Exception as error:  # the boundary of one sample: it counts, and the others go on
            reason = error.reason if isinstance(error, Undecodable) else Reason.INTERNAL_ERROR
            if reason is Reason.INTERNAL_ERROR:
                logger.error("an image could not be processed", exc_info=error)
            self.notes.images[stream.row] = replace(image, reason=reason)
            return None, None, None, None, None, str(error) or type(error).__name__
        height, width = pixels.shape[:2]
        return encoded, width, height, picture.width, picture.height, None

    @property
    def _needed_px(self) -> int | None:
        """Only where the shorter side decides can a JPEG be decoded smaller without a second thought."""
        return self.spec.image.size_px if self.spec.image.resize_mode in {"keep_ratio", "center_crop"} else None


class _SampleWriter:
    """img2dataset's sample writer, ours. It is given as the class of itself: calling it gives the one there is."""

    def __init__(self, writer: ShardWriter, notes: _Notes, shard: int, first_key: int) -> None:
        self._writer = writer
        self._notes = notes
        self._shard = shard
        self._first_key = first_key
        self._error: OSError | None = None

    def __call__(self, *_theirs: object) -> _SampleWriter:
        return self

    def write(self, encoded: bytes | None, key: str, _caption: object, meta: Mapping[str, Any]) -> None:
        index = int(key) - self._first_key
        try:
            self._writer.add(index, {**meta, **self._our_columns(index)}, encoded)
        except OSError as error:  # img2dataset would print it and go on
            self._error = self._error or error
            raise

    def close(self) -> None:
        """Raises what kept a sample from being written."""
        if self._error is not None:
            self._writer.discard()
            raise self._error
        self._writer.close()

    def _our_columns(self, index: int) -> dict[str, Any]:
        fetch = self._notes.fetches.pop(index)
        image = self._notes.images.pop(index, _Image())
        reason = fetch.reason or image.reason
        failed = reason is not None and reason.outcome is Outcome.FAILED
        return {
            "outcome": reason.outcome if reason else Outcome.KEPT,
            "reason": reason,
            "error_class": (fetch.error_class or ErrorClass.PERMANENT) if failed else None,
            "http_status": fetch.http_status,
            "opt_out": asdict(fetch.opt_out) if fetch.opt_out else None,
            "mime": fetch.mime,
            "phash": image.phash,
            "orientation": image.orientation,
            "original_width": image.original_width,
            "original_height": image.original_height,
            "final_url": fetch.final_url,
            "fetched_at": fetch.fetched_at,
            "attempts": fetch.attempts,
            "shard": self._shard,
        }
