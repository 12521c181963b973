"""Images a second that one shard download stores, beside stock img2dataset's `Downloader` (1.47) as the peer.

Both fetch the same URLs of the gallery on loopback, without faults: a request for each image, opt-out headers looked
at, PNG decoded and laid on white, cropped to a square, stored as JPEG with the source's SHA-256 in a tar and a Parquet
table. Same sizes, settings, number of threads, one process each, no Ray. Ours also writes what the ledger has beyond
img2dataset's columns, with a perceptual hash and a hash of the stored bytes, and keeps the list's order. The two take
turns, and the medians are compared; a run that stored anything else than the other's is an error. Starting the
processes and importing is not counted; the server shares the machine with whichever of the two is at work. The last
line is JSON.

    python benchmarks/acquire.py [--quick | --urls N] [--json FILE]
"""

from __future__ import annotations

import argparse
import datetime
import functools
import multiprocessing
import os
import platform
import socket
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from cases.rows import Row, last_line, processor, write_json

from infra.storage import Store
from pipelines.acquire.download import SHARD_DIGITS
from pipelines.acquire.shard import ShardTask, make
from pipelines.dataset.uid import make_uid
from pipelines.gallery.links import HOST, Gallery
from pipelines.gallery.server import serving
from pipelines.recipe import AcquireSpec, Fetch, ImageFormat

QUICK_URLS = 400
WARM_UP_URLS = 32
ROUNDS = 3
THREADS = 32
SIZE_PX = 64
OPT_OUT_DIRECTIVES = ["noai", "noimageai", "noindex", "noimageindex"]
"""What img2dataset's command line looks for if nothing is said."""
COMPARED_COLUMNS = ("url", "caption", "status", "sha256", "width", "height", "original_width", "original_height")

Download = Callable[[Any, AcquireSpec, Path], Path]


@dataclass(frozen=True)
class Run:
    """One shard downloaded: how long it took, and the columns that are to be the same on both sides."""

    duration_s: float
    stored: Any

    @property
    def images_per_s(self) -> float:
        return self.stored.num_rows / self.duration_s


def download_ours(rows: Any, spec: AcquireSpec, folder: Path) -> Path:
    """Path of the ledger."""
    return make(ShardTask("benchmark", "unit", rows, spec, Store(folder / "unused")), folder).ledger_path


def download_peer(rows: Any, spec: AcquireSpec, folder: Path) -> Path:
    """Path of img2dataset's Parquet table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from img2dataset.downloader import Downloader
        from img2dataset.resizer import Resizer
        from img2dataset.writer import WebDatasetSampleWriter
    feather = folder / "rows.feather"
    with pa.OSFile(str(feather), "wb") as sink, pa.ipc.new_file(sink, rows.schema) as file:
        file.write_table(rows)
    image = spec.image
    resizer = Resizer(
        image.size_px,
        image.resize_mode,
        resize_only_if_bigger=not image.upscale,
        encode_quality=image.encode_quality,
        encode_format=image.encode_format,
    )
    job = Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=resizer,
        thread_count=spec.fetch.threads,
        save_caption=True,
        extract_exif=False,
        output_folder=str(folder),
        column_list=rows.schema.names,
        timeout=spec.fetch.timeout_s,
        number_sample_per_shard=spec.shard_size,
        oom_shard_count=SHARD_DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=image.encode_format,
        retries=spec.fetch.attempts - 1,
        user_agent_token=None,
        disallowed_header_directives=OPT_OUT_DIRECTIVES,
    )
    job.download_shard((0, str(feather)))
    return folder / f"{0:0{SHARD_DIGITS}d}.parquet"


def timed(side: Download, rows: Any, spec: AcquireSpec) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        started_s = time.perf_counter()
        table_path = side(rows, spec, Path(folder))
        duration_s = time.perf_counter() - started_s
        stored = pq.read_table(table_path, columns=list(COMPARED_COLUMNS)).sort_by("url")
    stored = stored.select(list(COMPARED_COLUMNS)).cast(stored_schema())
    if set(stored["status"].to_pylist()) != {"success"} or stored.num_rows != rows.num_rows:
        num_stored = stored["status"].to_pylist().count("success")
        raise SystemExit(f"{side.__name__} stored {num_stored} of {rows.num_rows} images; nothing to compare")
    return Run(duration_s, stored)


def stored_schema() -> Any:
    kinds = {name: pa.int32() if name.endswith(("width", "height")) else pa.string() for name in COMPARED_COLUMNS}
    return pa.schema(list(kinds.items()))


def take_turns(rows: Any, spec: AcquireSpec) -> tuple[list[Run], list[Run]]:
    """Runs of ours and of the peer, each in a process of its own, warmed up. Raises `SystemExit` if they differ.

    Spawned, for the server's thread is no thing to fork.
    """
    worker = functools.partial(ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"))
    sides: tuple[Download, Download] = (download_ours, download_peer)
    runs: tuple[list[Run], list[Run]] = ([], [])
    with worker() as ours, worker() as peer:
        for side, process in zip(sides, (ours, peer), strict=True):
            process.submit(timed, side, rows.slice(0, WARM_UP_URLS), spec).result()
        for _ in range(ROUNDS):
            for side, process, done in zip(sides, (ours, peer), runs, strict=True):
                done.append(process.submit(timed, side, rows, spec).result())
            if not runs[0][-1].stored.equals(runs[1][-1].stored):
                raise SystemExit("the two stored different images; nothing to compare")
    return runs


def gallery_of(num_urls: int | None) -> Gallery:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    gallery = Gallery(port, limit=num_urls, fault_rate=0.0)
    available = len(Gallery(port).emojis())
    if num_urls is not None and not WARM_UP_URLS <= num_urls <= available:
        raise SystemExit(
            f"--urls {num_urls}: the gallery has {available}; give a number from {WARM_UP_URLS} up to that"
        )
    return gallery


def main() -> None:
    parser = argparse.ArgumentParser(description="Shard download beside img2dataset's, in images a second.")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help=f"{QUICK_URLS} URLs, under 40 s")
    size.add_argument("--urls", type=int, metavar="N", help="how many URLs; all of the gallery if not given")
    parser.add_argument("--json", type=Path, help="write the result there, with its turns")
    options = parser.parse_args()
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # the peer's import would ask a server for a newer version

    gallery = gallery_of(QUICK_URLS if options.quick else options.urls)
    rows = gallery.table().select(["url", "caption"])
    uids = [make_uid(row["url"], row["caption"]) for row in rows.to_pylist()]
    rows = rows.append_column("uid", pa.array(uids, pa.string()))
    spec = AcquireSpec(
        shard_size=rows.num_rows,
        fetch=Fetch(allow_hosts=(gallery.authority,), threads=THREADS),
        image=ImageFormat(size_px=SIZE_PX, resize_mode="center_crop", encode_format="jpg", encode_quality=95),
    )
    with serving(gallery):
        runs = take_turns(rows, spec)

    rates = [[run.images_per_s for run in side] for side in runs]
    ours, peer = (statistics.median(side) for side in rates)
    version = metadata.version("img2dataset")
    print(f"{datetime.date.today()}, {processor()}, Python {platform.python_version()}, {rows.num_rows} URLs")
    for name, side in zip(("shard download", f"img2dataset {version}"), rates, strict=True):
        turns = ", ".join(f"{rate:.0f}" for rate in side)
        print(f"{name:>18}: {statistics.median(side):6.0f} images/s (turns: {turns})")
    rows_told = [Row(f"gallery PNG to {SIZE_PX} px JPEG, {THREADS} threads", "images/s", ours, peer)]
    turns_told = dict(zip(("ours", "peer"), rates, strict=True))
    machine = {"date": datetime.date.today().isoformat(), "machine": processor(), "img2dataset": version}
    write_json(options.json, machine | {"urls": rows.num_rows, "turns": turns_told})
    print(last_line("acquire", rows_told))


if __name__ == "__main__":
    main()
