from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.acquire.errors import SourceError
from pipelines.acquire.plan import shards, source_identity
from pipelines.acquire.tables import rows_digest
from pipelines.dataset.uid import make_uid
from pipelines.recipe import GallerySource, UrlsSource

PAIRS = [(f"http://a.example/{n}.png", f'caption "{n}", with ü') for n in range(7)]


def write_parquet(path: Path, columns: dict[str, Any]) -> None:
    pq.write_table(pa.table(columns), path)


def write_csv(path: Path, columns: dict[str, Any]) -> None:
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def write_tsv(path: Path, columns: dict[str, Any]) -> None:
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    path.write_text("\n".join("\t".join(map(str, row)) for row in rows) + "\n", encoding="utf-8")


def write_jsonl(path: Path, columns: dict[str, Any]) -> None:
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")


WRITERS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    ".parquet": write_parquet,
    ".csv": write_csv,
    ".tsv": write_tsv,
    ".jsonl": write_jsonl,
}


def columns(pairs: list[tuple[str, str]] = PAIRS) -> dict[str, Any]:
    return {"URL": [url for url, _ in pairs], "TEXT": [text for _, text in pairs], "score": list(range(len(pairs)))}


def source(*files: Path | str, **changes: Any) -> UrlsSource:
    settings = {"url_column": "URL", "caption_column": "TEXT", **changes}
    return UrlsSource(kind="urls", files=tuple(map(str, files)), **settings)


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_the_same_pairs(tmp_path: Path, suffix: str) -> None:
    WRITERS[suffix](tmp_path / f"list{suffix}", columns())
    tables = list(shards(source(tmp_path / f"list{suffix}", keep_columns=("score",)), 3))
    assert [table.num_rows for table in tables] == [3, 3, 1]
    whole = pa.concat_tables(tables)
    assert whole.column_names == ["url", "caption", "uid", "score"]
    assert list(zip(whole["url"].to_pylist(), whole["caption"].to_pylist(), strict=True)) == PAIRS
    assert whole["uid"].to_pylist() == [make_uid(*pair) for pair in PAIRS]
    assert [int(score) for score in whole["score"].to_pylist()] == list(range(7))
    assert whole["score"].type == (pa.int64() if suffix == ".parquet" else pa.string())


def test_compressed_lists(tmp_path: Path) -> None:
    write_csv(tmp_path / "plain.csv", columns())
    (tmp_path / "list.csv.gz").write_bytes(gzip.compress((tmp_path / "plain.csv").read_bytes()))
    (table,) = shards(source(tmp_path / "list.csv.gz"), 100)
    assert table["url"].to_pylist() == [url for url, _ in PAIRS]


def test_given_uids_are_honoured(tmp_path: Path) -> None:
    write_parquet(tmp_path / "l.parquet", columns() | {"id": ["own", None, "", "x", "y", "z", "w"]})
    (table,) = shards(source(tmp_path / "l.parquet", uid_column="id"), 100)
    assert table["uid"].to_pylist() == ["own", make_uid(*PAIRS[1]), make_uid(*PAIRS[2]), "x", "y", "z", "w"]


def test_numbers_as_uids(tmp_path: Path) -> None:
    write_parquet(tmp_path / "l.parquet", columns())
    (table,) = shards(source(tmp_path / "l.parquet", uid_column="score", keep_columns=("score",)), 100)
    assert table["uid"].to_pylist() == [str(n) for n in range(7)]
    assert table["score"].to_pylist() == list(range(7))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5), shard_size=st.integers(1, 12))
def test_shards_are_cut_of_each_file_alone(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], shard_size: int
) -> None:
    folder = tmp_path_factory.mktemp("lists")
    first = 0
    for place, size in enumerate(sizes):
        pairs = [(f"http://a.example/{n}", str(n)) for n in range(first, first + size)]
        write_parquet(
            folder / f"{place}.parquet", columns(pairs) if pairs else {n: pa.array([], pa.string()) for n in columns()}
        )
        first += size
    tables = list(shards(source(folder), shard_size))
    assert [url for table in tables for url in table["url"].to_pylist()] == [
        f"http://a.example/{n}" for n in range(first)
    ]
    cut = [min(shard_size, size - start) for size in sizes for start in range(0, size, shard_size)]
    assert [table.num_rows for table in tables] == cut


def test_folders_and_patterns_are_read_in_order(tmp_path: Path) -> None:
    for place in (2, 0, 1):
        write_parquet(tmp_path / f"part-{place}.parquet", columns(PAIRS[place : place + 1]))
    (tmp_path / "README.md").write_text("not a list")
    for files in (tmp_path, tmp_path / "part-*.parquet"):
        tables = shards(source(files), 10)
        assert [table["caption"].to_pylist() for table in tables] == [[text] for _, text in PAIRS[:3]]


def test_appending_to_a_list_leaves_whole_shards_as_they_were(tmp_path: Path) -> None:
    write_csv(tmp_path / "l.csv", columns(PAIRS[:5]))
    before = [rows_digest(table) for table in shards(source(tmp_path / "l.csv"), 2)]
    write_csv(tmp_path / "l.csv", columns(PAIRS))
    after = [rows_digest(table) for table in shards(source(tmp_path / "l.csv"), 2)]
    assert after[:2] == before[:2]
    assert after[2] != before[2]


def test_identity_follows_content_and_columns(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", columns())
    (tmp_path / "b.csv").write_bytes((tmp_path / "a.csv").read_bytes())
    here, settings = source_identity(source(tmp_path / "a.csv"))
    assert settings["names"] == ["a.csv"]
    assert source_identity(source(tmp_path / "b.csv"))[0] == here
    assert source_identity(source(tmp_path / "a.csv", keep_columns=("score",)))[0] != here
    write_csv(tmp_path / "b.csv", columns(PAIRS[:6]))
    assert source_identity(source(tmp_path / "b.csv"))[0] != here


def test_identity_of_a_large_list_does_not_read_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.acquire.sources.urls.WHOLE_FILE_BYTES", 100)
    monkeypatch.setattr("pipelines.acquire.sources.urls.SAMPLE_BYTES", 60)
    write_csv(tmp_path / "a.csv", columns())
    here = source_identity(source(tmp_path / "a.csv"))
    assert source_identity(source(tmp_path / "a.csv")) == here
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "a.csv").write_text(text[:-3] + "9" + text[-2:])
    assert source_identity(source(tmp_path / "a.csv")) != here


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.csv", None, "no file .*absent.csv"),
        ("list.xlsx", b"x", "no known format"),
        ("wrong.csv", b"link,TEXT\nhttp://a,b\n", "wrong.csv has no column 'URL'; it has 'link', 'TEXT'"),
        ("wrong.jsonl", b'{"link": "http://a"}\n', "no column 'URL', 'TEXT'"),
        ("empty.csv", b"URL,TEXT\n", "no rows in"),
        ("empty.jsonl", b"", "no rows in"),
        ("broken.parquet", b"PAR1 not really", "can't be read as parquet"),
        ("broken.jsonl", b'{"URL": ', "can't be read as jsonl"),
        ("list.jsonl", b"[1, 2]\n", "line 1: expected an object"),
        ("latin.csv", "URL,TEXT\nhttp://a,é\n".encode("latin-1"), "can't be read as csv"),
        ("cut.csv.gz", gzip.compress(b"URL,TEXT\n" + b"http://a,b\n" * 1000)[:40], "can't be read as csv"),
    ],
)
def test_lists_that_cannot_be_used(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        source_identity(source(tmp_path / name))


def test_columns_that_would_collide(tmp_path: Path) -> None:
    write_parquet(tmp_path / "l.parquet", columns() | {"width": list(range(7))})
    with pytest.raises(SourceError, match="width are the ledger's own columns"):
        source_identity(source(tmp_path / "l.parquet", keep_columns=("score", "width")))


def test_lists_of_other_types_are_told_before_anything_is_fetched(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", columns())
    write_parquet(tmp_path / "b.parquet", columns() | {"score": [float(n) for n in range(7)]})
    assert source_identity(source(tmp_path, keep_columns=("score",)))
    write_parquet(tmp_path / "c.parquet", columns() | {"score": [str(n) for n in range(7)]})
    with pytest.raises(SourceError, match=r"c\.parquet doesn't fit together with the lists before it"):
        source_identity(source(tmp_path, keep_columns=("score",)))


def test_every_list_is_looked_at(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", columns())
    (tmp_path / "b.csv").write_text("link,TEXT\nhttp://a,b\n")
    with pytest.raises(SourceError, match=r"b\.csv has no column 'URL'"):
        source_identity(source(tmp_path))


def test_a_folder_given_as_a_list(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(
        SourceError, match=r"photos' is a folder without lists .*set source\.kind=folder and source\.path="
    ):
        source_identity(source(tmp_path / "photos"))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_list_without_a_header(tmp_path: Path, suffix: str) -> None:
    separator = "," if suffix == ".csv" else "\t"
    (tmp_path / f"list{suffix}").write_text(
        f"http://a.example/1.png{separator}a cat\nhttp://a.example/2.png{separator}b\n"
    )
    with pytest.raises(SourceError, match=r"'URL', 'TEXT': its first line is to name the columns, but has a URL in it"):
        source_identity(source(tmp_path / f"list{suffix}"))


def test_rows_longer_than_the_header(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("link,words\na,b,c\n")
    with pytest.raises(SourceError, match=r"it has 'link', 'words'; set"):
        source_identity(source(tmp_path / "list.csv"))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([1, 2]), "int64"),
        (pa.array([1.5, 2.5]), "double"),
        (pa.array([b"http://a.example/1", b"x"]), "binary"),
        (pa.array([["http://a.example/1"], []]), "list<element: string>"),
        (pa.array([True, False]), "bool"),
        (pa.array([None, None], pa.null()), "null"),
    ],
)
def test_urls_that_are_no_text(tmp_path: Path, values: Any, kind: str) -> None:
    write_parquet(tmp_path / "l.parquet", {"URL": values, "TEXT": ["a", "b"]})
    with pytest.raises(SourceError, match=r"source\.url_column: column 'URL' of .*l\.parquet is of type") as caught:
        source_identity(source(tmp_path / "l.parquet"))
    assert f"of type {kind}" in str(caught.value)


@pytest.mark.parametrize(("value", "kind"), [("5", "int"), ("1.5", "float"), ('["http://a"]', "list"), ("{}", "dict")])
def test_urls_of_json_that_are_no_text(tmp_path: Path, value: str, kind: str) -> None:
    row = '{"URL": %s, "TEXT": "a"}\n'
    (tmp_path / "l.jsonl").write_text(row % value)
    with pytest.raises(SourceError, match=rf"column 'URL' of .*l\.jsonl is of type {kind}, and is to be text"):
        source_identity(source(tmp_path / "l.jsonl"))
    (tmp_path / "l.jsonl").write_text(row % value + row % '"http://a.example/1"' + row % "null")
    (table,) = shards(source(tmp_path / "l.jsonl"), 10)
    assert table["url"].to_pylist()[1:] == ["http://a.example/1", None]


def test_urls_as_texts_of_other_types(tmp_path: Path) -> None:
    urls = ["http://a.example/1", "http://a.example/2"]
    for values in (pa.array(urls, pa.large_string()), pa.array(urls).dictionary_encode()):
        write_parquet(tmp_path / "l.parquet", {"URL": values, "TEXT": ["a", "b"]})
        (table,) = shards(source(tmp_path / "l.parquet"), 10)
        assert table["url"].to_pylist() == urls
        assert table["url"].type == pa.string()


def test_captions_that_are_no_text(tmp_path: Path) -> None:
    write_parquet(tmp_path / "l.parquet", {"URL": ["http://a.example/1"], "TEXT": [["a", "b"]]})
    with pytest.raises(SourceError, match=r"has a column of type list<element: string> for caption"):
        source_identity(source(tmp_path / "l.parquet"))


def test_lists_in_an_object_store(s3_url: str) -> None:
    import fsspec

    with fsspec.open(f"{s3_url}/list.jsonl", "w") as file:
        file.write(json.dumps({"URL": "http://a.example/x", "TEXT": "x"}) + "\n")
    listed = source(f"{s3_url}/list.jsonl")
    assert source_identity(listed)[0]["files"]
    (table,) = shards(listed, 10)
    assert table["url"].to_pylist() == ["http://a.example/x"]


def test_the_gallery_is_a_source() -> None:
    gallery = GallerySource(kind="gallery", port=8391, limit=10)
    (table,) = shards(gallery, 100)
    assert table.column_names == ["url", "caption", "uid", "name", "vendor", "licence"]
    assert source_identity(gallery) != source_identity(GallerySource(kind="gallery", port=8392, limit=10))
