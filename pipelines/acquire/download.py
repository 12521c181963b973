"""Rows of a shard from the web, or from a folder: img2dataset's Downloader with our fetcher, resizer and writer.

It knows rows by their place alone; what they are called and where they are stored is the caller's matter.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa

from pipelines.acquire.decode import Undecodable, open_picture
from pipelines.acquire.errors import ShardFailed
from pipelines.acquire.fetch import FetchResult
from pipelines.acquire.filter import judge_size, size_message
from pipelines.acquire.resize import encode, fit, phash
from pipelines.acquire.rows import ImageFacts
from pipelines.dataset.ledger import Reason
from pipelines.recipe import AcquireSpec

SHARD_DIGITS = 5
"""img2dataset's: of the number by which it knows a shard, 0 here."""
POLL_S = 0.1
"""How soon an interruption is noticed."""

Fetch = Callable[[str], FetchResult]
Write = Callable[[int, FetchResult, ImageFacts, Mapping[str, Any], bytes | None], None]
"""Takes a row's place, what became of it, img2dataset's own columns, and the image if there is one to keep."""

_DOWNLOADER_LOCK = threading.Lock()

logger = logging.getLogger(__name__)


def download(
    urls: Sequence[str | None],
    spec: AcquireSpec,
    fetch: Fetch,
    write: Write,
    folder: Path,
    stopped: threading.Event,
) -> None:
    """Fetch, filter and resize all of `urls`; `write` is called for each, from one thread, in no particular order.

    `folder` is for img2dataset's own files. However this ends before all is done, `stopped` is set: what is under way
    then ends by itself, at the latest with its deadline, and is written nowhere.

    Raises what `write` raises, at the end.
    """
    downloader = import_downloader()
    cv2.setNumThreads(1)
    table = pa.table({"url": pa.array(urls, pa.string())})
    feather = folder / "rows.feather"
    with pa.OSFile(str(feather), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    notes = _Notes()
    writer = _SampleWriter(write, notes, stopped)
    job = downloader.Downloader(
        sample_writer_class=writer,
        resizer=_Resizer(spec, notes),
        thread_count=spec.fetch.threads,
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=table.schema.names,
        timeout=spec.fetch.timeout_s,
        number_sample_per_shard=len(urls),
        oom_shard_count=SHARD_DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=spec.image.encode_format,
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=None,
    )

    def work() -> None:
        with _downloads_by(downloader, _DownloadFunction(fetch, notes, stopped)):
            job.download_shard((0, str(feather)))

    _interruptibly(work, stopped)
    writer.check()


def _interruptibly(work: Callable[[], None], stopped: threading.Event) -> None:
    """`work` in a thread of its own, so that an interruption ends the wait for it at once.

    img2dataset's pool, left by an exception, waits for a thread that waits for a semaphore that nobody releases.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="download")
    thread.start()
    try:
        while thread.is_alive():  # in short waits: Ray's cancelling wakes nobody
            thread.join(POLL_S)
    except BaseException:
        stopped.set()
        raise
    if errors:
        raise errors[0]


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


class _Body(io.BytesIO):
    """A fetched body that knows its row: what img2dataset carries from our fetcher to our resizer."""

    def __init__(self, row: int, data: bytes) -> None:
        super().__init__(data)
        self.row = row


@dataclass
class _Notes:
    """What img2dataset has no place for, by row: kept until the row is written."""

    fetches: dict[int, FetchResult] = field(default_factory=dict)
    images: dict[int, ImageFacts] = field(default_factory=dict)


@dataclass(frozen=True)
class _DownloadFunction:
    """img2dataset's `download_image_with_retry`, ours: (row, url) to (row, stream, error). Called from its threads."""

    fetch: Fetch
    notes: _Notes
    stopped: threading.Event

    def __call__(self, row: tuple[int, str | None], **_theirs: object) -> tuple[int, _Body | None, str | None]:
        index, url = row
        if self.stopped.is_set():
            return index, None, "stopped"
        try:
            result = self.fetch(url or "")
        except Exception as error:  # the boundary of one sample; img2dataset's pool would wait for ever
            logger.error("a row could not be fetched", exc_info=error)
            result = FetchResult(reason=Reason.INTERNAL_ERROR, message=f"{type(error).__name__}: {error}", attempts=1)
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
        image = ImageFacts()
        try:
            picture = open_picture(stream.getvalue(), self.spec.fetch.max_pixels)
            image = ImageFacts(picture.mime, picture.width, picture.height, picture.orientation)
            reason = judge_size(picture.width, picture.height, self.spec.filter)
            if reason is not None:
                raise Undecodable(reason, size_message(picture.width, picture.height, reason))
            pixels = fit(picture.pixels(self._needed_px), self.spec.image)
            encoded = encode(pixels, self.spec.image)
            self.notes.images[stream.row] = replace(image, phash=phash(pixels))
        except Exception as error:  # the boundary of one sample: it counts, and the others go on
            reason = Reason.INTERNAL_ERROR
            if isinstance(error, Undecodable):
                reason = error.reason
                image = ImageFacts(*error.seen) if error.seen else image
            else:
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

    def __init__(self, write: Write, notes: _Notes, stopped: threading.Event) -> None:
        self._write = write
        self._notes = notes
        self._stopped = stopped
        self._error: Exception | None = None

    def __call__(self, *_theirs: object) -> _SampleWriter:
        return self

    def write(self, encoded: bytes | None, key: str, _caption: object, meta: Mapping[str, Any]) -> None:
        if self._stopped.is_set():
            return
        index = int(key)
        fetch = self._notes.fetches.pop(index)
        image = self._notes.images.pop(index, ImageFacts())
        try:
            self._write(index, fetch, image, meta, encoded)
        except Exception as error:  # noqa: BLE001 - raised by `check`; img2dataset would print it and go on
            self._error = self._error or error
            self._stopped.set()

    def close(self) -> None:
        """What kept a sample from being written is raised by `check`, past img2dataset's pool."""

    def check(self) -> None:
        if self._error is not None:
            raise self._error
