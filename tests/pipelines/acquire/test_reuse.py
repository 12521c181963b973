"""Rows taken over by one shard from others, with no cluster: what is asked for, and that the bytes are those of a first
fetch from the same server."""

from __future__ import annotations

import io
import itertools
import socket
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from asked import asked
from PIL import Image

from infra.storage import StorageError, Store
from pipelines.acquire.earlier import all_of, earlier_units, find_rows, uid_hashes
from pipelines.acquire.origin import WEB
from pipelines.acquire.record import LIMITS, STAGE, made_with
from pipelines.acquire.shard import ShardTask, acquire_shard
from pipelines.artifacts import UNITS_TABLE, Unit
from pipelines.building import building
from pipelines.dataset.ledger import VOLATILE_COLUMNS
from pipelines.dataset.uid import make_uid
from pipelines.recipe import AcquireSpec, Fetch, ImageFormat, PairFilter

FORMAT = 2
NUMBERS = itertools.count()


def png(width: int, height: int, seed: int = 0) -> bytes:
    noise = np.random.default_rng([width, height, seed]).integers(0, 256, (height, width, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).save(sink, "PNG")
    return sink.getvalue()


def ok(body: bytes, *lines: str, announced: bool = True) -> bytes:
    length = [f"Content-Length: {len(body)}"] if announced else []
    return "\r\n".join(["HTTP/1.1 200 OK", *length, *lines, "", ""]).encode() + body


def bare(status: str, *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", "Content-Length: 0", *lines, "", ""]).encode()


@dataclass
class Site:
    """Pages of one server, made one after another into one list; what was asked for since `forget`."""

    hostile: Any
    pairs: list[tuple[str, str]] = field(default_factory=list)

    def page(self, name: str, answer: Any, caption: str | None = None) -> None:
        self.pairs.append((self.hostile.url(f"/{name}", answer), f"a {name}" if caption is None else caption))

    def forget(self) -> None:
        self.hostile.requests.clear()

    @property
    def asked(self) -> list[str]:
        """Names, sorted, each as often as it was asked for."""
        return sorted(path[1:] for path, heads in self.hostile.requests.items() for _ in heads)

    def table(self, order: Sequence[int] | None = None, **more: Any) -> pa.Table:
        pairs = [self.pairs[place] for place in (range(len(self.pairs)) if order is None else order)]
        columns = {"url": [url for url, _ in pairs], "caption": [caption for _, caption in pairs]}
        columns["uid"] = [make_uid(*pair) for pair in pairs]
        return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()} | more)

    def spec(self, *, image: Any = None, filter: Any = None, **fetch: Any) -> AcquireSpec:
        rules = {"timeout_s": 2.0, "attempts": 1, "threads": 4, "allow_hosts": (self.hostile.host,), **fetch}
        stored = {"size_px": 16, "resize_mode": "border", "encode_format": "png", "encode_quality": 3, **(image or {})}
        return AcquireSpec(fetch=Fetch(**rules), image=ImageFormat(**stored), filter=PairFilter(**(filter or {})))


@pytest.fixture
def site(hostile: Any) -> Site:
    return Site(hostile)


def shard(store: Store, table: pa.Table, spec: AcquireSpec, asked: tuple[str, ...] = (), name: str = "one") -> Unit:
    """A unit of these rows, that takes over what the store's other units know."""
    facts = made_with(spec, None, FORMAT)
    hashes = uid_hashes(table["uid"].to_pylist())
    units = earlier_units(store, facts)
    places = find_rows(store, units, np.unique(hashes)).of(hashes) if units else None
    key = f"{next(NUMBERS):032x}"
    return acquire_shard(ShardTask(name, key, table, spec, store, WEB, facts, places, asked))


def ledger(store: Store, unit: Unit) -> pa.Table:
    return pq.read_table(store.open(unit.only(".parquet")))


def expect_as_fetched(store: Store, unit: Unit, table: pa.Table, spec: AcquireSpec, folder: Path) -> None:
    """The unit is, to the byte, what a first fetch gives."""
    fresh = Store(folder / f"fresh{next(NUMBERS)}")
    other = shard(fresh, table, spec)
    assert other.info["taken_over"] == 0
    mine, theirs = (ledger(*pair).drop_columns(list(VOLATILE_COLUMNS)) for pair in ((store, unit), (fresh, other)))
    assert mine.to_pylist() == theirs.to_pylist()
    assert store.read_bytes(unit.only(".tar")) == fresh.read_bytes(other.only(".tar"))
    assert (unit.digest, unit.counts) == (other.digest, other.counts)


def all_sorts(site: Site) -> None:
    """A page for whatever can become of a URL."""
    site.page("good", ok(png(40, 40)))
    site.page("large", ok(png(90, 80)))
    site.page("unannounced", ok(png(64, 60), announced=False))
    site.page("small", ok(png(20, 30)))
    site.page("long", ok(png(100, 25)))
    site.page("moved", bare("302 Found", "Location: /good"))
    site.page("signed", ok(png(41, 41), "X-Robots-Tag: noai"))
    site.page("moved-signed", bare("302 Found", "Location: /good", "tdm-reservation: 1"))
    site.page("moved-signed-gone", bare("302 Found", "Location: /gone", "tdm-reservation: 1"))
    site.page("gone", bare("410 Gone"))
    site.page("busy", bare("503 Busy"))
    site.page("page", ok(b"<html>" + b" " * 30_000))
    site.page("torn", ok(png(50, 50)[:-900]))
    site.page("headless", ok(png(50, 50)[:20]))
    site.page("cut", ok(png(52, 52))[:-100])
    site.page("turned", ok(turned()))
    site.page("silent", ok(png(42, 42)), "")
    site.page("terse", ok(png(43, 43)), "ab")
    site.pairs.append(("http://10.0.0.1/x.png", "a private one"))
    site.pairs.append(("ftp://a.example/x.png", "an old one"))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    sink = io.BytesIO()
    Image.open(io.BytesIO(png(70, 30))).save(sink, "JPEG", quality=90, exif=exif)
    return sink.getvalue()


SIGNED = {"signed", "moved-signed", "moved-signed-gone"}
CHANGES: list[tuple[dict[str, Any], dict[str, Any], set[str]]] = [
    ({}, {}, set()),
    ({}, {"filter": {"min_side_px": 35}}, set()),
    ({"filter": {"min_side_px": 35}}, {}, {"small", "long", "turned"}),
    (
        {"filter": {"min_side_px": 65}},
        {"filter": {"min_side_px": 35}},
        {"good", "moved", "unannounced", "torn", "terse"},
    ),
    ({}, {"filter": {"max_aspect": 2.0}}, set()),
    ({"filter": {"max_aspect": 2.0}}, {}, {"long", "turned"}),
    ({}, {"fetch": {"max_pixels": 2000}}, set()),
    ({"fetch": {"max_pixels": 2000}}, {}, {"large", "unannounced", "long", "torn", "turned"}),
    ({"fetch": {"max_pixels": 2000}}, {"fetch": {"max_pixels": 2400}}, {"turned"}),
    ({"fetch": {"max_pixels": 2000}}, {"filter": {"min_side_px": 35}}, {"large", "unannounced", "torn"}),
    ({}, {"fetch": {"max_bytes": 7000}}, set()),
    ({"fetch": {"max_bytes": 7000}}, {"fetch": {"max_bytes": 6000}}, set()),
    ({"fetch": {"max_bytes": 7000}}, {}, {"large", "unannounced", "long", "page", "cut"}),
    ({}, {"fetch": {"opt_out": False}}, SIGNED),
    ({"fetch": {"opt_out": False}}, {}, set()),
    ({"fetch": {"opt_out": False}}, {"filter": {"min_side_px": 200}}, set()),
    ({}, {"filter": {"min_caption_chars": 3}}, set()),
    ({"filter": {"min_caption_chars": 3}}, {}, {"terse"}),
    ({"filter": {"min_caption_chars": 0}}, {}, set()),
    ({"filter": {"min_side_px": 35}, "fetch": {"opt_out": False}}, {"fetch": {"max_bytes": 7000}}, {"small", "turned"}),
]


def with_rules(site: Site, rules: dict[str, Any]) -> AcquireSpec:
    return site.spec(filter=rules.get("filter"), **rules.get("fetch", {}))


@pytest.mark.parametrize(("before", "after", "asked"), CHANGES)
def test_changed_rules_ask_for_no_more_than_they_must(
    site: Site, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], asked: set[str]
) -> None:
    all_sorts(site)
    store, table = Store(tmp_path / "store"), site.table()
    first = shard(store, table, with_rules(site, before))
    expect_as_fetched(store, first, table, with_rules(site, before), tmp_path)
    site.forget()
    second = shard(store, table, with_rules(site, after))
    led_to = {"moved": "good", "moved-signed": "good", "moved-signed-gone": "gone"}
    assert site.asked == sorted([*asked, *(led_to[name] for name in asked if name in led_to)])
    expect_as_fetched(store, second, table, with_rules(site, after), tmp_path)
    # And back again: what was dropped meanwhile has its image in the first shard still.
    site.forget()
    third = shard(store, table, with_rules(site, before))
    assert not set(site.asked) & {"good", "large", "unannounced"} & _kept(store, first)
    expect_as_fetched(store, third, table, with_rules(site, before), tmp_path)


def _kept(store: Store, unit: Unit) -> set[str]:
    rows = ledger(store, unit).to_pylist()
    return {row["url"].rpartition("/")[2] for row in rows if row["outcome"] == "kept"}


def test_the_order_of_rows_and_their_shards_do_not_matter(site: Site, tmp_path: Path) -> None:
    all_sorts(site)
    store, spec = Store(tmp_path / "store"), site.spec()
    places = np.random.default_rng(0).permutation(len(site.pairs))
    for part in np.array_split(places, 3):
        shard(store, site.table(part), spec)
    site.forget()
    order = np.random.default_rng(1).permutation(len(site.pairs))
    for part in np.array_split(order, 2):
        unit = shard(store, site.table(part), spec)
        assert site.asked == []
        expect_as_fetched(store, unit, site.table(part), spec, tmp_path)
        site.forget()


def test_further_columns_are_the_new_lists(site: Site, tmp_path: Path) -> None:
    all_sorts(site)
    store, spec = Store(tmp_path / "store"), site.spec()
    number = len(site.pairs)
    shard(store, site.table(licence=pa.array(["CC0"] * number), score=pa.array(range(number))), spec)
    site.forget()
    renewed = site.table(licence=pa.array(["CC-BY-4.0"] * number), tags=pa.array([["a", "b"]] * number))
    unit = shard(store, renewed, spec)
    assert site.asked == []
    assert "score" not in ledger(store, unit).column_names
    assert set(ledger(store, unit)["licence"].to_pylist()) == {"CC-BY-4.0"}
    expect_as_fetched(store, unit, renewed, spec, tmp_path)


@pytest.mark.parametrize(
    "change", [{"size_px": 17}, {"encode_format": "jpg"}, {"resize_mode": "no"}, {"upscale": True}]
)
def test_other_images_are_fetched(site: Site, tmp_path: Path, change: dict[str, Any]) -> None:
    site.page("good", ok(png(40, 40)))
    site.page("gone", bare("410 Gone"))
    store = Store(tmp_path / "store")
    shard(store, site.table(), site.spec())
    site.forget()
    shard(store, site.table(), site.spec(image=change))
    assert site.asked == ["gone", "good"]


def test_other_manners_change_nothing(site: Site, tmp_path: Path) -> None:
    all_sorts(site)
    store = Store(tmp_path / "store")
    first = shard(store, site.table(), site.spec())
    site.forget()
    manners = site.spec(timeout_s=9.0, attempts=5, user_agent="other/2", contact="a@b.example", max_redirects=1)
    second = shard(store, site.table(), manners)
    assert site.asked == []
    assert ledger(store, second).equals(ledger(store, first))  # with what varies: that is taken over, too


def test_the_same_pair_under_another_uid_is_another(site: Site, tmp_path: Path) -> None:
    site.page("good", ok(png(40, 40)))
    site.page("other", ok(png(44, 44)))
    store, spec = Store(tmp_path / "store"), site.spec()
    table = site.table().set_column(2, "uid", pa.array(["first", "second"]))
    shard(store, table, spec)
    site.forget()
    changes = {
        "uid": table.set_column(2, "uid", pa.array(["first", "third"])),
        "caption": table.set_column(1, "caption", pa.array([table["caption"][0].as_py(), "another"])),
        "url": table.set_column(0, "url", pa.array([table["url"][0].as_py(), table["url"][1].as_py() + "?x"])),
    }
    site.hostile.answers["/other?x"] = site.hostile.answers["/other"]
    for name, changed in changes.items():
        shard(store, changed, spec)
        assert site.asked == ["other?x" if name == "url" else "other"], name
        site.forget()
    # Normal forms are the same pair.
    urls = [url.replace("http://", "HTTP://") + "#part" for url in table["url"].to_pylist()]
    captions = [f" {caption.replace(' ', chr(10))} " for caption in table["caption"].to_pylist()]
    unit = shard(store, pa.table({"url": urls, "caption": captions, "uid": ["first", "second"]}), spec)
    assert site.asked == []
    assert ledger(store, unit)["caption"].to_pylist() == captions


# -- what is damaged ---------------------------------------------------------------------------------------------------


def damaged(store: Store, unit: Unit, what: str) -> None:
    """Spoils the first kept image's row in the unit."""
    tar, rows = (Path(store.location(unit.only(suffix))) for suffix in (".tar", ".parquet"))
    with tarfile.open(tar) as opened:
        member = next(entry for entry in opened if entry.name.endswith(".png"))
    data = bytearray(tar.read_bytes())
    if what == "tar gone":
        tar.unlink()
    elif what == "tar cut short":
        tar.write_bytes(data[: member.offset_data + 5])
    elif what == "tar empty":
        tar.write_bytes(b"")
    elif what == "bit of an image":
        data[member.offset_data + 30] ^= 4
        tar.write_bytes(data)
    elif what == "bit of a header":
        data[member.offset + 130] ^= 1  # its size
        tar.write_bytes(data)
    elif what == "ledger gone":
        rows.unlink()
    else:
        flipped = bytearray(rows.read_bytes())
        flipped[{"bit of the ledger": len(flipped) // 3, "bit of its footer": len(flipped) - 20}[what]] ^= 16
        rows.write_bytes(flipped)


@pytest.mark.parametrize(
    ("what", "lost"),
    [
        ("tar gone", {"good", "large"}),
        ("tar cut short", {"good", "large"}),
        ("tar empty", {"good", "large"}),
        ("bit of an image", {"good"}),
        ("bit of a header", {"good", "large"}),
        ("ledger gone", {"good", "large", "gone"}),
        ("bit of the ledger", {"good", "large", "gone"}),
        ("bit of its footer", {"good", "large", "gone"}),
    ],
)
def test_what_is_damaged_is_fetched(site: Site, tmp_path: Path, what: str, lost: set[str]) -> None:
    site.page("good", ok(png(40, 40)))
    site.page("large", ok(png(90, 80)))
    site.page("gone", bare("410 Gone"))
    store, spec = Store(tmp_path / "store"), site.spec()
    first = shard(store, site.table(), spec)
    damaged(store, first, what)
    site.forget()
    unit = shard(store, site.table(), spec)
    assert {"good"} <= set(site.asked) <= lost
    assert len(site.asked) == len(set(site.asked))
    expect_as_fetched(store, unit, site.table(), spec, tmp_path)


def test_what_a_store_can_not_read_is_no_reason_to_ask_again(site: Site, tmp_path: Path) -> None:
    site.page("good", ok(png(40, 40)))
    store, spec = Store(tmp_path / "store"), site.spec()
    rows = Path(store.location(shard(store, site.table(), spec).only(".parquet")))
    rows.unlink()
    rows.mkdir()  # which no store reads
    site.forget()
    with pytest.raises(StorageError, match="can't be read: Is a directory; bring the right file back"):
        shard(store, site.table(), spec)
    assert site.asked == []


def test_a_damaged_copy_gives_way_to_an_older_image_but_to_no_older_failure(site: Site, tmp_path: Path) -> None:
    def recovering(peer: socket.socket, times: int) -> None:
        peer.sendall(ok(png(40, 40)) if times > 1 else bare("503 Busy"))

    site.page("flaky", recovering)
    site.page("good", ok(png(90, 80)))
    store, spec = Store(tmp_path / "store"), site.spec()
    shard(store, site.table(), spec)
    newer = shard(store, site.table(), spec, asked=("transient",))
    assert newer.counts.kept == 2
    Path(store.location(newer.only(".tar"))).unlink()
    site.forget()
    unit = shard(store, site.table(), spec)
    assert site.asked == ["flaky"]  # "good" is in the older tar
    assert unit.counts.kept == 2


# -- which of several --------------------------------------------------------------------------------------------------


def test_kept_rows_win_over_newer_failures(site: Site, tmp_path: Path) -> None:
    def leaving(peer: socket.socket, times: int) -> None:
        peer.sendall(ok(png(40, 40)) if times == 1 else bare("410 Gone"))

    site.page("fading", leaving)
    store, spec = Store(tmp_path / "store"), site.spec()
    facts = made_with(spec, None, FORMAT)
    shard(store, site.table(), spec)
    anew = acquire_shard(ShardTask("two", "f" * 32, site.table(), spec, store, WEB, facts))
    assert anew.counts.kept == 0
    site.forget()
    assert shard(store, site.table(), spec).counts.kept == 1
    assert site.asked == []


def test_an_opt_out_is_not_undone_by_a_copy_from_before(site: Site, tmp_path: Path) -> None:
    def objecting(peer: socket.socket, times: int) -> None:
        peer.sendall(ok(png(40, 40), *([] if times == 1 else ["X-Robots-Tag: noai"])))

    site.page("objecting", objecting)
    store, spec = Store(tmp_path / "store"), site.spec()
    facts = made_with(spec, None, FORMAT)
    shard(store, site.table(), spec)
    acquire_shard(ShardTask("two", "f" * 32, site.table(), spec, store, WEB, facts))
    site.forget()
    assert shard(store, site.table(), spec).counts.dropped == {"opt_out": 1}
    assert shard(store, site.table(), spec, asked=("opt_out",)).counts.dropped == {"opt_out": 1}
    assert site.asked == ["objecting"]
    # Without the rule, the copy from before will do.
    assert shard(store, site.table(), site.spec(opt_out=False)).counts.kept == 1
    assert site.asked == ["objecting"]


# -- asked again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (("transient",), {"busy", "cut"}),
        (("server_error",), {"busy"}),
        (("not_found",), {"gone"}),
        (("too_small",), {"small"}),
        (("failed",), {"busy", "cut", "gone", "page", "torn", "headless"}),
        (("opt_out", "not_found"), {"signed", "moved-signed", "moved-signed-gone", "gone"}),
        (("dns",), set()),
    ],
)
def test_only_what_is_named_is_asked_for_again(
    site: Site, tmp_path: Path, asked: tuple[str, ...], expected: set[str]
) -> None:
    all_sorts(site)
    store, spec = Store(tmp_path / "store"), site.spec(filter={"min_side_px": 24})
    first = shard(store, site.table(), spec)
    site.forget()
    second = shard(store, site.table(), spec, asked)
    assert set(site.asked) == expected
    assert second.digest == first.digest


# -- uids --------------------------------------------------------------------------------------------------------------


def test_any_text_may_be_a_uid(site: Site, tmp_path: Path) -> None:
    uids = ["../../etc/passwd", "a/b", "ünïcödé 日本語 \U0001f600", "x" * 10_000, " ", "\n", "a\0b", ".", "A", "a"]
    for number in range(len(uids)):
        site.page(f"p{number}", ok(png(40 + number, 40)))
    store, spec = Store(tmp_path / "store"), site.spec()
    table = site.table().set_column(2, "uid", pa.array(uids))
    unit = shard(store, table, spec)
    assert unit.counts.kept == len(uids)
    rows = ledger(store, unit)
    assert rows["uid"].to_pylist() == uids
    keys = rows["key"].to_pylist()
    assert len(set(keys)) == len(uids)
    assert all(len(key) == 20 and int(key, 16) >= 0 for key in keys)
    with tarfile.open(fileobj=store.open(unit.only(".tar"))) as tar:
        assert sorted(tar.getnames()) == sorted(f"{key}.{suffix}" for key in keys for suffix in ("json", "png", "txt"))
    site.forget()
    reversed_ = table.take(list(range(len(uids) - 1, -1, -1)))
    expect_as_fetched(store, shard(store, reversed_, spec), reversed_, spec, tmp_path)
    assert len(site.asked) == len(uids)  # by the first fetch that was compared with


def test_a_uid_that_comes_again_in_a_shard_is_not_fetched(site: Site, tmp_path: Path) -> None:
    for name in ("one", "two", "three", "four"):
        site.page(name, ok(png(40, 40 + len(site.pairs))), "" if name == "three" else None)
    store, spec = Store(tmp_path / "store"), site.spec()
    table = site.table().set_column(2, "uid", pa.array(["u", "u", "v", "v"]))
    unit = shard(store, table, spec)
    assert site.asked == ["four", "one"]
    assert ledger(store, unit)["reason"].to_pylist() == [None, "repeated", "caption_empty", None]
    assert unit.counts.dropped == {"caption_empty": 1, "repeated": 1}
    with tarfile.open(fileobj=store.open(unit.only(".tar"))) as tar:
        assert len(tar.getnames()) == len(set(tar.getnames())) == 6
    site.forget()
    turned_round = table.take([1, 0, 3, 2])
    again = shard(store, turned_round, spec)
    assert site.asked == ["two"]
    expect_as_fetched(store, again, turned_round, spec, tmp_path)


def test_a_twin_takes_all_of_the_first(site: Site, tmp_path: Path) -> None:
    all_sorts(site)
    store, spec, table = Store(tmp_path / "store"), site.spec(), site.table()
    first = shard(store, table, spec, name="one")
    site.forget()
    facts = made_with(spec, None, FORMAT)
    twin = acquire_shard(ShardTask("two", "e" * 32, table, spec, store, WEB, facts, all_of(first)))
    assert site.asked == []
    assert twin.counts == first.counts
    assert twin.key != first.key
    mine, theirs = (ledger(store, unit).drop_columns(["shard"]) for unit in (first, twin))
    assert mine.equals(theirs)


# -- the record --------------------------------------------------------------------------------------------------------


def test_manners_stay_with_the_rows_that_failed_under_them(site: Site, tmp_path: Path) -> None:
    site.page("busy", bare("503 Busy"))
    site.pairs.append(("http://10.0.0.1/x.png", "a private one"))
    store = Store(tmp_path / "store")
    first = shard(store, site.table(), site.spec(attempts=1))
    (entry,) = first.info["manners"].values()
    assert (entry["settings"]["attempts"], entry["settings"]["allow_hosts"]) == (1, [site.hostile.host])
    assert entry["reasons"] == {"address_not_allowed": 1, "server_error": 1}
    assert entry["transient"] == {"server_error": 1}
    site.page("busier", bare("503 Busy"))
    second = shard(store, site.table(), site.spec(attempts=2))
    by_attempts = {entry["settings"]["attempts"]: entry["reasons"] for entry in second.info["manners"].values()}
    assert by_attempts == {1: {"address_not_allowed": 1, "server_error": 1}, 2: {"server_error": 1}}
    assert (second.info["taken_over"], first.info["taken_over"]) == (2, 0)


def test_units_of_another_format_are_passed_over(site: Site, tmp_path: Path) -> None:
    site.page("good", ok(png(40, 40)))
    store, spec = Store(tmp_path / "store"), site.spec()
    shard(store, site.table(), spec)
    assert [unit.counts.kept for unit in earlier_units(store, made_with(spec, None, FORMAT))] == [1]
    assert earlier_units(store, made_with(spec, None, FORMAT + 1)) == []
    assert earlier_units(store, made_with(spec, "a gallery's", FORMAT)) == []


def test_units_made_under_what_no_rule_can_hold_rows_against_are_passed_over(site: Site, tmp_path: Path) -> None:
    class LaterFetch(Fetch):
        """With content that is added one day."""

        accept: str = ""

    site.page("good", ok(png(40, 40)))
    store, spec = Store(tmp_path / "store"), site.spec()
    shard(store, site.table(), spec)

    def found(accept: str) -> int:
        later = spec.model_copy(update={"fetch": LaterFetch(**spec.fetch.model_dump(), accept=accept)})
        return len(earlier_units(store, made_with(later, None, FORMAT)))

    assert found("") == 1
    assert found("image/png") == 0
    assert LIMITS["fetch"] <= Fetch.model_fields.keys()
    assert LIMITS["filter"] <= PairFilter.model_fields.keys()


def test_a_list_of_units_that_is_not_what_was_published_is_not_believed(site: Site, tmp_path: Path) -> None:
    site.page("good", ok(png(40, 40)))
    store, spec = Store(tmp_path / "store"), site.spec()
    unit = shard(store, site.table(), spec)
    with building(store, STAGE, asked(), {}, {}, FORMAT) as build:
        path = f"{build.publish([unit]).path}/{UNITS_TABLE}"
    assert earlier_units(store, made_with(spec, None, FORMAT)) == [unit]
    table = pq.read_table(io.BytesIO(store.read_bytes(path)))
    record = table["record"][0].as_py()
    sink = io.BytesIO()
    pq.write_table(table.set_column(2, "record", [[record.replace('"kept": 1', '"kept": 3')]]), sink)
    store.publish_bytes(path, sink.getvalue())
    assert earlier_units(store, made_with(spec, None, FORMAT)) == [unit]


def test_rows_in_an_object_store(site: Site, s3_url: str, tmp_path: Path) -> None:
    all_sorts(site)
    store, spec = Store(s3_url), site.spec()
    shard(store, site.table(), spec)
    site.forget()
    unit = shard(store, site.table(range(len(site.pairs) - 1, -1, -1)), spec)
    assert site.asked == []
    expect_as_fetched(store, unit, site.table(range(len(site.pairs) - 1, -1, -1)), spec, tmp_path)
