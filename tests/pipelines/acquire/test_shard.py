from __future__ import annotations

import errno
import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.storage import Store
from pipelines.acquire.download import import_downloader
from pipelines.acquire.shard import ShardTask, acquire_shard, make
from pipelines.acquire.write import ShardWriter
from pipelines.artifacts import find_unit
from pipelines.dataset.uid import make_uid, sample_key
from pipelines.recipe import AcquireSpec, Fetch, ImageFormat, PairFilter

THEIRS = """
import sys, warnings
warnings.simplefilter("ignore")
from img2dataset.downloader import Downloader
from img2dataset.resizer import Resizer
from img2dataset.writer import WebDatasetSampleWriter
feather, folder = sys.argv[1:]
resizer = Resizer(32, "border", True, encode_format="png", encode_quality=6)
job = Downloader(WebDatasetSampleWriter, resizer, 4, True, False, folder, ["url", "caption", "extra"], 5, 100, 5,
                 "sha256", None, "png", 0, None, None)
job.download_shard((7, feather))
"""


def image(side: int = 64, kind: str = "PNG", color: Any = None) -> bytes:
    noise = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    sink = io.BytesIO()
    (Image.new("RGB", (side, side), color) if color else Image.fromarray(noise)).save(sink, kind)
    return sink.getvalue()


def ok(body: bytes, *lines: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", *lines, "", ""]).encode() + body


def rows(urls: list[str | None], captions: list[str | None] | None = None) -> pa.Table:
    texts = captions or [f"caption {n}" for n in range(len(urls))]
    uids = [make_uid(url or "", text or "") for url, text in zip(urls, texts, strict=True)]
    extra = pa.array(range(len(urls)), pa.int64())
    string = pa.string()
    return pa.table(
        {
            "url": pa.array(urls, string),
            "caption": pa.array(texts, string),
            "uid": pa.array(uids, string),
            "extra": extra,
        }
    )


def task(hostile: Any, table: pa.Table, store: Store | None = None, **fetch: Any) -> ShardTask:
    rules = {"timeout_s": 2.0, "attempts": 2, "max_bytes": 100_000, "max_pixels": 100_000, "threads": 4, **fetch}
    spec = AcquireSpec(
        shard_size=100,
        fetch=Fetch(allow_hosts=(hostile.host,), **rules),
        image=ImageFormat(size_px=32, resize_mode="border", encode_format="png", encode_quality=6),
        filter=PairFilter(min_side_px=16, max_aspect=3.0, min_caption_chars=3),
    )
    return ShardTask("seven", "unit", table, spec, store or Store("unused"))


@pytest.fixture
def webful(hostile: Any) -> tuple[list[str | None], list[str | None], list[str | None]]:
    """URLs of every sort, captions, and the reasons that they are to have."""

    def flaky(peer: socket.socket, times: int) -> None:
        peer.sendall(ok(image(50)) if times > 1 else b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n")

    tall = io.BytesIO()
    Image.new("RGB", (20, 100)).save(tall, "PNG")
    moved = b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: "
    entries: list[tuple[str | None, str | None, str | None]] = [
        (hostile.url("/good.png", ok(image())), "a fine caption", None),
        (hostile.url("/good.jpg", ok(image(40, "JPEG"))), "another one", None),
        (hostile.url("/flaky.png", flaky), "third time lucky", None),
        (hostile.url("/moved.png", moved + b"/good.png\r\n\r\n"), "moved away", None),
        (hostile.url("/gone", b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n"), "no more", "not_found"),
        (hostile.url("/page", ok(b"<html>" * 50)), "a page", "not_an_image"),
        (hostile.url("/big", ok(image(300))), "too heavy", "too_many_bytes"),
        (hostile.url("/wide", ok(image(320, color="red"))), "too many", "too_many_pixels"),
        (hostile.url("/tiny", ok(image(10))), "too small", "too_small"),
        (hostile.url("/tall", ok(tall.getvalue())), "too tall", "too_elongated"),
        (hostile.url("/torn", ok(image()[:2000])), "torn apart", "decode_error"),
        (hostile.url("/noai", ok(image(), "X-Robots-Tag: noai")), "not for us", "opt_out"),
        (hostile.url("/inside", moved + b"http://10.0.0.1/\r\n\r\n"), "to the inside", "address_not_allowed"),
        ("file:///etc/hostname", "a local file", "scheme_not_allowed"),
        (hostile.url("/mute.png", ok(image())), "  ", "caption_empty"),
        (hostile.url("/short.png", ok(image())), "ab", "caption_too_short"),
        (None, "no address", "invalid_url"),
        (hostile.url("/null.png", ok(image())), None, "caption_empty"),
    ]
    urls, captions, reasons = zip(*entries, strict=True)
    return list(urls), list(captions), list(reasons)


def test_every_url_has_a_row_with_its_reason(hostile: Any, webful: Any, tmp_path: Path) -> None:
    urls, captions, reasons = webful
    store = Store(tmp_path / "store")
    unit = acquire_shard(task(hostile, rows(urls, captions), store))
    ledger = pq.read_table(store.open(unit.only(".parquet")))
    assert ledger["url"].to_pylist() == urls
    assert ledger["caption"].to_pylist() == captions
    assert ledger["reason"].to_pylist() == reasons
    assert ledger["extra"].to_pylist() == list(range(len(urls)))
    keys = [sample_key(uid) for uid in ledger["uid"].to_pylist()]
    assert ledger["key"].to_pylist() == keys
    assert set(ledger["shard"].to_pylist()) == {"seven"}
    unit.counts.check("shard")
    assert (unit.counts.total, unit.counts.kept) == (len(urls), 4)
    assert unit.counts.failed == {"decode_error": 1, "invalid_url": 1, "not_an_image": 1, "not_found": 1}
    assert unit.counts.dropped["caption_empty"] == 2
    assert unit.info["shard"] == "seven"
    assert [entry.name for entry in unit.files] == ["seven.parquet", "seven.tar"]
    by_path = {str(row["url"]).rpartition("/")[2]: row for row in ledger.to_pylist()}
    assert by_path["flaky.png"]["attempts"] == 2
    assert by_path["moved.png"]["final_url"] == urls[0]
    assert by_path["moved.png"]["sha256"] == by_path["good.png"]["sha256"]
    assert by_path["noai"]["opt_out"] == {
        "signal": "x-robots-tag",
        "evidence": "X-Robots-Tag: noai",
        "http_status": 200,
    }
    assert by_path["gone"]["http_status"] == 410
    assert by_path["gone"]["error_class"] == by_path["torn"]["error_class"] == "permanent"
    assert by_path["noai"]["error_class"] is None
    assert by_path["good.jpg"]["mime"] == "image/jpeg"
    assert (by_path["tall"]["original_width"], by_path["tall"]["original_height"]) == (20, 100)
    assert by_path["wide"]["status"] == "failed_to_resize"
    assert hostile.asked("/mute.png") == hostile.asked("/null.png") == hostile.asked("/short.png") == 0
    with tarfile.open(fileobj=store.open(unit.only(".tar"))) as tar:
        assert [name for name in tar.getnames() if name.endswith("png")] == [f"{key}.png" for key in keys[:4]]


def test_two_runs_give_the_same_bytes(hostile: Any, webful: Any, tmp_path: Path) -> None:
    table = rows(*webful[:2])
    units = [acquire_shard(task(hostile, table, Store(tmp_path / name), threads=n)) for name, n in (("a", 1), ("b", 8))]
    tars = [Store(tmp_path / name).read_bytes(unit.only(".tar")) for name, unit in zip("ab", units, strict=True)]
    assert tars[0] == tars[1]
    assert units[0].info["content"] == units[1].info["content"]


def test_columns_and_values_are_those_of_img2dataset(hostile: Any, tmp_path: Path) -> None:
    """The same list, by img2dataset alone and by us."""
    paths = [hostile.url(f"/{side}.png", ok(image(side))) for side in (32, 64, 100)]
    table = rows([*paths, hostile.url("/gone", b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")])
    folder = tmp_path / "theirs"
    folder.mkdir()
    feather = tmp_path / "rows.feather"
    with pa.OSFile(str(feather), "wb") as sink, pa.ipc.new_file(sink, table.drop_columns(["uid"]).schema) as file:
        file.write_table(table.drop_columns(["uid"]))
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    subprocess.run(
        [sys.executable, "-c", THEIRS, str(feather), str(folder)], check=True, capture_output=True, env=environment
    )
    theirs = pq.read_table(folder / "00007.parquet").sort_by("key")
    made = make(task(hostile, table), tmp_path)
    ours = pq.read_table(made.ledger_path)
    assert set(theirs.column_names) <= set(ours.column_names)
    shared = [name for name in theirs.column_names if name not in {"error_message", "key"}]
    assert ours.select(shared).cast(theirs.select(shared).schema).equals(theirs.select(shared))
    ours_by_theirs = dict(zip(theirs["key"].to_pylist(), ours["key"].to_pylist(), strict=True))
    with tarfile.open(made.tar_path) as our_tar, tarfile.open(folder / "00007.tar") as their_tar:
        assert len(our_tar.getnames()) == len(their_tar.getnames())
        for name in their_tar.getnames():
            key, _, suffix = name.partition(".")
            other = their_tar.extractfile(name).read()  # type: ignore[union-attr]
            mine = our_tar.extractfile(f"{ours_by_theirs[key]}.{suffix}").read()  # type: ignore[union-attr]
            if suffix == "json":
                assert (json.loads(other) | {"key": ours_by_theirs[key]}).items() <= json.loads(mine).items()
            else:
                assert mine == other


def test_a_full_disk_is_an_error_and_publishes_nothing(
    hostile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    store = Store(tmp_path / "store")
    with pytest.raises(OSError, match="No space left"):
        acquire_shard(task(hostile, rows([hostile.url("/a.png", ok(image()))]), store))
    assert find_unit(store, "acquire", "unit") is None


def test_img2dataset_is_left_as_it_was(hostile: Any, tmp_path: Path) -> None:
    module = import_downloader()
    theirs = module.download_image_with_retry
    make(task(hostile, rows([hostile.url("/a.png", ok(image()))])), tmp_path)
    assert module.download_image_with_retry is theirs
    assert theirs.__module__ == "img2dataset.downloader"
    assert import_downloader() is module


def test_a_unit_that_appeared_meanwhile_is_taken(hostile: Any, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    job = task(hostile, rows([hostile.url("/a.png", ok(image()))]), store)
    first = acquire_shard(job)
    assert acquire_shard(job) == first


def test_a_broken_decoder_fails_its_image_alone(hostile: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr("pipelines.acquire.download.fit", explode)
    made = make(task(hostile, rows([hostile.url("/a.png", ok(image())), "ftp://x"])), tmp_path)
    assert pq.read_table(made.ledger_path)["reason"].to_pylist() == ["internal_error", "scheme_not_allowed"]
