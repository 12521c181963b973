from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipelines.acquire.errors import ShardFailed
from pipelines.acquire.write import ShardWriter
from pipelines.dataset.ledger import ledger_schema

SCHEMA = ledger_schema(
    pa.schema([("url", pa.string()), ("caption", pa.string()), ("uid", pa.string()), ("date", pa.date32())])
)


def row(index: int, **changes: Any) -> dict[str, Any]:
    import datetime

    kept = index % 3 != 0
    return {
        "url": f"http://a.example/{index}",
        "caption": f"caption {index} ü",
        "uid": f"{index:032x}",
        "date": datetime.date(2026, 1, 1 + index),
        "key": f"{index:08d}",
        "status": "success" if kept else "failed_to_download",
        "outcome": "kept" if kept else "failed",
        "reason": None if kept else "timeout",
        "shard": "00000",
    } | changes


def write(folder: Path, order: list[int], **changes: Any) -> ShardWriter:
    folder.mkdir()
    writer = ShardWriter(folder, "00000", SCHEMA, "png", len(order))
    for index in order:
        kept = index % 3 != 0
        writer.add(index, row(index, **changes), f"image {index}".encode() * index if kept else None)
    writer.close()
    return writer


def test_order_of_arrival_and_what_varies_leave_no_trace(tmp_path: Path) -> None:
    import datetime

    order = list(range(20))
    first = write(tmp_path / "a", order, attempts=1)
    random.Random(0).shuffle(order)
    now = datetime.datetime.now(datetime.UTC)
    second = write(tmp_path / "b", order, attempts=3, fetched_at=now, final_url="http://b.example/")
    assert first.tar_path.read_bytes() == second.tar_path.read_bytes()
    varying = ["fetched_at", "attempts", "final_url"]
    one, two = (pq.read_table(writer.ledger_path) for writer in (first, second))
    assert one.drop_columns(varying).equals(two.drop_columns(varying))
    assert one["url"].to_pylist() == [f"http://a.example/{index}" for index in range(20)]
    assert not one.equals(two)


def test_members_name_nobody_and_no_time(tmp_path: Path) -> None:
    with tarfile.open(write(tmp_path / "a", [0, 1, 2]).tar_path) as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [
        f"0000000{key}.{suffix}" for key in (1, 2) for suffix in ("json", "png", "txt")
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # it leaves the tar open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_reads_the_tar(tmp_path: Path) -> None:
    path = write(tmp_path / "a", [2, 1, 0]).tar_path
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == ["00000001", "00000002"]
    assert [sample["png"] for sample in samples] == [b"image 1", b"image 2image 2"]
    assert samples[0]["txt"].decode() == "caption 1 ü"
    meta = json.loads(samples[0]["json"])
    assert (meta["url"], meta["status"], meta["date"]) == ("http://a.example/1", "success", "2026-01-02")
    assert not {"fetched_at", "attempts", "final_url"} & set(meta)


def test_a_lost_row_is_an_error(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "00007", SCHEMA, "png", 3)
    writer.add(0, row(0), None)
    writer.add(2, row(2), b"image")
    with pytest.raises(ShardFailed, match="00007: 1 rows were lost, the first is 1"):
        writer.close()
    assert not writer.tar_path.exists()


def test_nothing_kept_gives_an_empty_tar(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "00000", SCHEMA, "png", 1)
    writer.add(0, row(0), None)
    writer.close()
    with tarfile.open(fileobj=io.BytesIO(writer.tar_path.read_bytes())) as tar:
        assert tar.getmembers() == []
    assert pq.read_table(writer.ledger_path).num_rows == 1
