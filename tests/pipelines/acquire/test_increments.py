"""Lists that grow, shrink and move, rules and manners that change, through the whole stage on a real local Ray: what is
asked of the server, which shards stay, and that the rest is what a first run would have made."""

from __future__ import annotations

import csv
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from infra.storage import Store
from pipelines.acquire.errors import NoImages
from pipelines.acquire.record import STAGE
from pipelines.acquire.record import STAGE as NODE
from pipelines.acquire.retry import asked_rows, curable, reasons_of
from pipelines.acquire.stage import FORMAT_VERSION, acquire, identity
from pipelines.again import ask_again, asked_again
from pipelines.artifacts import Artifact, artifact_key, find
from pipelines.dataset.ledger import VOLATILE_COLUMNS, Reason
from pipelines.dataset.ledgers import shard_of
from pipelines.errors import UsageError
from pipelines.recipe import (
    AcquireSpec,
    Execution,
    Fetch,
    FolderSource,
    GallerySource,
    ImageFormat,
    PairFilter,
    SelectSpec,
    Split,
    UrlsSource,
)
from pipelines.reporting import LogReport
from pipelines.select.stage import select

pytestmark = pytest.mark.usefixtures("local_ray")

SHARD_SIZE = 4
DRIVER = """
import sys
from infra.cluster import ClusterSpec, cluster
from infra.storage import Store
from pipelines.acquire.stage import acquire
from pipelines.recipe import AcquireSpec, Execution, UrlsSource
from pipelines.reporting import LogReport
spec, source, store = sys.argv[1:]
with cluster(ClusterSpec(num_cpus=1, object_store_bytes=80 * 2**20, forward_output=False)):
    acquire(AcquireSpec.model_validate_json(spec), UrlsSource.model_validate_json(source), {}, Store(store),
            LogReport(), Execution(acquire_tasks=1))
"""

Pair = tuple[str, str]


def png(number: int, side: int = 40) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).save(sink, "PNG")
    return sink.getvalue()


def ok(body: bytes) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def bare(status: str) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n".encode()


class Web:
    """One server, lists of its pages in a folder, and a store."""

    def __init__(self, hostile: Any, folder: Path) -> None:
        self.hostile = hostile
        self.folder = folder
        self.store = Store(folder / "store")
        self.notes: list[str] = []

    def pairs(self, first: int, last: int) -> list[Pair]:
        return [(self.hostile.url(f"/{n}", ok(png(n))), f"picture {n}") for n in range(first, last)]

    def page(self, name: str, answer: Any) -> Pair:
        return self.hostile.url(f"/{name}", answer), f"page {name}"

    def list(self, name: str, rows: Sequence[Sequence[str]], header: Sequence[str] = ("url", "caption")) -> str:
        path = self.folder / name
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        return str(path)

    def spec(self, **changes: Any) -> AcquireSpec:
        fetch = {"timeout_s": 2.0, "attempts": 1, "threads": 4, "allow_hosts": (self.hostile.host,)}
        image = {"size_px": 16, "resize_mode": "border", "encode_format": "png", "encode_quality": 3}
        return AcquireSpec(
            shard_size=SHARD_SIZE,
            fetch=Fetch(**(fetch | changes.get("fetch", {}))),
            image=ImageFormat(**(image | changes.get("image", {}))),
            filter=PairFilter(**changes.get("filter", {})),
        )

    def run(self, *files: str, store: Store | None = None, uid: str | None = None, **changes: Any) -> Artifact:
        """What was asked for before is forgotten."""
        self.hostile.requests.clear()
        report = _Notes()
        self.notes = report.notes
        source = UrlsSource(kind="urls", files=files, uid_column=uid)
        return acquire(self.spec(**changes), source, {}, store or self.store, report, Execution(acquire_tasks=2))

    def key(self, *files: str, **changes: Any) -> str:
        source = UrlsSource(kind="urls", files=files)
        return artifact_key(NODE, FORMAT_VERSION, identity(self.spec(**changes), source).content, {})

    @property
    def asked(self) -> list[str]:
        return sorted(path[1:] for path, heads in self.hostile.requests.items() for _ in heads)

    def expect_as_first_run(self, artifact: Artifact, *files: str, **changes: Any) -> None:
        """The artifact has the revision, the rows and the tars of a run in an empty store."""
        store = Store(self.folder / f"fresh {time.monotonic_ns()}")
        fresh = self.run(*files, store=store, **changes)
        assert [unit.info["taken_over"] for unit in fresh.units] == [0] * len(fresh.units)
        assert artifact.revision == fresh.revision
        assert rows_of(self.store, artifact) == rows_of(store, fresh)
        assert tars(self.store, artifact) == tars(store, fresh)


class _Notes(LogReport):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def rows_of(store: Store, artifact: Artifact) -> list[dict[str, Any]]:
    tables = [pq.read_table(store.open(unit.only(".parquet"))) for unit in artifact.units]
    return [row for table in tables for row in table.drop_columns(list(VOLATILE_COLUMNS)).to_pylist()]


def tars(store: Store, artifact: Artifact) -> list[bytes]:
    return [store.read_bytes(unit.only(".tar")) for unit in artifact.units]


def keys(artifact: Artifact) -> list[str]:
    return [unit.key for unit in artifact.units]


def names(*numbers: int) -> list[str]:
    return sorted(str(number) for number in numbers)


@pytest.fixture
def web(hostile: Any, tmp_path: Path) -> Web:
    return Web(hostile, tmp_path)


# -- lists -------------------------------------------------------------------------------------------------------------


def test_a_list_put_first_and_taken_away_again(web: Web) -> None:
    old, new = web.list("old.csv", web.pairs(0, 6)), web.list("new.csv", web.pairs(10, 15))
    before = web.run(old)
    assert web.asked == names(*range(6))
    both = web.run(new, old)
    assert web.asked == names(*range(10, 15))
    assert keys(both)[2:] == keys(before)
    assert [shard_of(unit) for unit in both.units[2:]] == [shard_of(unit) for unit in before.units]
    web.expect_as_first_run(both, new, old)
    turned_round = web.run(old, new)
    assert web.asked == []
    assert turned_round.revision == both.revision
    alone = web.run(new)
    assert web.asked == []
    assert keys(alone) == keys(both)[:2]
    web.expect_as_first_run(alone, new)


def test_rows_appended_shuffled_and_removed(web: Web) -> None:
    rows = web.pairs(0, 7)
    web.run(web.list("list.csv", rows[:6]))
    grown = web.run(web.list("list.csv", rows))
    assert web.asked == ["6"]
    assert web.notes == ["acquire: 4 of 7 URLs are done already", "acquire: 2 of 3 URLs were known from earlier shards"]
    web.expect_as_first_run(grown, str(web.folder / "list.csv"))
    shuffled = [rows[place] for place in (4, 2, 6, 0, 3, 5, 1)]
    artifact = web.run(web.list("list.csv", shuffled))
    assert web.asked == []
    assert not set(keys(artifact)) & set(keys(grown))
    web.expect_as_first_run(artifact, str(web.folder / "list.csv"))
    fewer = web.run(web.list("list.csv", shuffled[1:]))
    assert web.asked == []
    web.expect_as_first_run(fewer, str(web.folder / "list.csv"))


def test_shards_of_another_size(web: Web) -> None:
    listed = web.list("list.csv", web.pairs(0, 9))
    web.run(listed)
    spec = web.spec().model_copy(update={"shard_size": 6})
    web.hostile.requests.clear()
    source = UrlsSource(kind="urls", files=(listed,))
    artifact = acquire(spec, source, {}, web.store, LogReport(), Execution())
    assert web.asked == []
    assert [unit.counts.total for unit in artifact.units] == [6, 3]


def test_a_list_given_twice(web: Web) -> None:
    listed = web.list("list.csv", web.pairs(0, 6))
    copy = web.list("copy.csv", web.pairs(0, 6))
    artifact = web.run(listed, copy)
    assert web.asked == names(*range(6))
    assert len(set(keys(artifact))) == len({shard_of(unit) for unit in artifact.units}) == 4
    assert artifact.counts.total == artifact.counts.kept == 12
    selected = select(SelectSpec(split=Split(held_out=0.0)), {"acquire": artifact}, web.store, LogReport(), Execution())
    assert (selected.counts.kept, selected.counts.dropped) == (6, {"repeated": 6})
    once = web.run(listed)
    assert web.asked == []
    assert keys(once) == keys(artifact)[:2]


def test_one_uid_with_two_urls(web: Web) -> None:
    rows = [(*pair, uid) for pair, uid in zip(web.pairs(0, 6), ("a", "b", "a", "c", "a", "d"), strict=True)]
    artifact = web.run(web.list("list.csv", rows, ("url", "caption", "id")), uid="id")
    assert web.asked == names(0, 1, 3, 4, 5)  # in the first shard the third row's uid came before
    assert artifact.counts.dropped == {"repeated": 1}
    selected = select(SelectSpec(split=Split(held_out=0.0)), {"acquire": artifact}, web.store, LogReport(), Execution())
    assert (selected.counts.kept, selected.counts.dropped) == (4, {"repeated": 1})


# -- rules, manners, images --------------------------------------------------------------------------------------------


def test_a_loosened_and_a_tightened_filter(web: Web) -> None:
    rows = [*web.pairs(0, 4), web.page("small", ok(png(99, 20))), web.page("gone", bare("410 Gone"))]
    listed = web.list("list.csv", rows)
    assert web.run(listed, filter={"min_side_px": 30}).counts.dropped == {"too_small": 1}
    loose = web.run(listed)
    assert web.asked == ["small"]
    web.expect_as_first_run(loose, listed)
    tight = web.run(listed, filter={"min_side_px": 30, "max_aspect": 1.5})
    assert web.asked == []
    web.expect_as_first_run(tight, listed, filter={"min_side_px": 30, "max_aspect": 1.5})


def test_manners_redo_nothing_and_other_images_everything(web: Web) -> None:
    listed = web.list("list.csv", [*web.pairs(0, 4), web.page("busy", bare("503 Busy"))])
    before = web.run(listed)
    manners = {"timeout_s": 1.0, "attempts": 3, "contact": "me@a.example", "user_agent": "x/1", "threads": 1}
    again = web.run(listed, fetch=manners | {"max_redirects": 1})
    assert (again.revision, again.key, web.asked) == (before.revision, before.key, [])
    assert web.key(listed) == web.key(listed, fetch=manners) == before.key
    web.run(listed, image={"size_px": 20})
    assert web.asked == sorted(["busy", *names(*range(4))])


def test_forcing_takes_nothing_over(web: Web) -> None:
    listed = web.list("list.csv", web.pairs(0, 5))
    before = web.run(listed)
    ask_again(web.store, NODE, before.key, "force")
    again = web.run(listed)
    assert web.asked == names(*range(5))
    assert again.revision == before.revision
    assert [unit.info["taken_over"] for unit in again.units] == [0, 0]
    web.run(web.list("list.csv", web.pairs(0, 6)))
    assert web.asked == ["5"]


def test_a_server_that_is_gone_is_not_needed(web: Web) -> None:
    rows = web.pairs(0, 6)
    web.run(web.list("list.csv", rows))
    web.hostile.close()
    artifact = web.run(web.list("list.csv", rows[::-1]))
    assert artifact.counts.kept == 6


# -- asked again -------------------------------------------------------------------------------------------------------


def recovering(peer: socket.socket, times: int) -> None:
    peer.sendall(ok(png(1)) if times > 1 else bare("503 Busy"))


def test_asking_again_for_what_failed_for_a_time(web: Web) -> None:
    rows = [*web.pairs(0, 4), *web.pairs(10, 13), web.page("flaky", recovering)]
    listed = web.list("list.csv", [*rows, web.page("gone", bare("410 Gone")), web.page("busy", bare("503 Busy"))])
    before = web.run(listed)
    assert [asked_rows(unit, ("transient",)) for unit in before.units] == [0, 1, 1]
    ask_again(web.store, STAGE, before.key, "retry", reasons_of("transient"))
    assert find(web.store, NODE, before.key) is None
    after = web.run(listed)
    assert web.asked == ["busy", "flaky"]
    assert web.notes[0] == "acquire: 2 of 10 URLs are asked for again (transient)"
    assert keys(after)[0] == keys(before)[0]
    assert not set(keys(after)[1:]) & set(keys(before))
    assert [shard_of(unit) for unit in after.units] == [shard_of(unit) for unit in before.units]
    assert after.counts.failed == {"not_found": 1, "server_error": 1}
    assert after.counts.kept == before.counts.kept + 1
    web.expect_as_first_run(after, listed)
    # Later increments find the renewed shards.
    more = web.run(listed, web.list("more.csv", web.pairs(20, 22)))
    assert web.asked == ["20", "21"]
    assert keys(more)[:3] == keys(after)


def test_asking_again_for_all_that_failed_and_for_one_reason(web: Web) -> None:
    rows = [*web.pairs(0, 2), web.page("gone", bare("410 Gone")), web.page("busy", bare("503 Busy"))]
    listed = web.list("list.csv", [*rows, web.page("small", ok(png(9, 20)))])
    rules = {"filter": {"min_side_px": 30}}
    before = web.run(listed, **rules)
    for text, expected in (("failed", ["busy", "gone"]), ("not_found", ["gone"]), ("too_small", ["small"])):
        ask_again(web.store, STAGE, before.key, "retry", reasons_of(text))
        after = web.run(listed, **rules)
        assert web.asked == expected
        assert after.revision == before.revision  # the server says the same
        assert asked_again(web.store, NODE, before.key) is None


def test_asking_for_what_is_not_there(web: Web) -> None:
    listed = web.list("list.csv", web.pairs(0, 5))
    before = web.run(listed)
    ask_again(web.store, STAGE, before.key, "retry", reasons_of("timeout,dns"))
    after = web.run(listed)
    assert web.asked == []
    assert web.notes == ["acquire: none of 5 URLs is to be asked for again (dns, timeout)"]
    assert keys(after) == keys(before)
    assert find(web.store, NODE, before.key) is not None


@pytest.mark.parametrize("text", ["transient,nothing", "", " , ", "caption_empty", "repeated", "kept"])
def test_reasons_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match=r"--retry: .* give some of transient, failed, scheme_not_allowed, .*timeout"):
        reasons_of(text)


def test_reasons() -> None:
    assert reasons_of("transient") == ("transient",)
    assert reasons_of(" timeout,failed , timeout") == ("failed", "timeout")
    assert reasons_of(",".join(r for r in Reason if r not in {"caption_empty", "caption_too_short", "repeated"}))


def test_a_loopback_list_is_refused_allowed_and_asked_for_again(web: Web) -> None:
    listed = web.list("list.csv", web.pairs(0, 5))
    refused = {"fetch": {"allow_hosts": ()}}
    with pytest.raises(NoImages, match=r"name such hosts of your own .* --retry address_not_allowed`$"):
        web.run(listed, **refused)
    with pytest.raises(NoImages, match=r"settings that may help have changed since: .* --retry address_not_allowed`$"):
        web.run(listed)
    assert web.asked == []
    key = web.key(listed)
    ask_again(web.store, STAGE, key, "retry", reasons_of("address_not_allowed"))
    with pytest.raises(NoImages):
        web.run(listed, **refused)
    assert asked_again(web.store, NODE, key) is None  # done, though nothing came of it
    ask_again(web.store, STAGE, key, "retry", reasons_of("address_not_allowed"))
    artifact = web.run(listed)
    assert web.asked == names(*range(5))
    assert artifact.counts.kept == 5
    web.expect_as_first_run(artifact, listed)


def test_what_a_refused_run_learned_is_not_asked_twice(web: Web) -> None:
    gone = [web.page(f"gone{n}", bare("410 Gone")) for n in range(3)]
    with pytest.raises(NoImages, match=r"not_found 3"):
        web.run(web.list("list.csv", gone))
    artifact = web.run(web.list("list.csv", [*web.pairs(0, 1), *gone]))
    assert web.asked == ["0"]
    assert artifact.counts.failed == {"not_found": 3}


def test_what_a_retry_learned_is_known_although_nothing_could_be_kept(web: Web) -> None:
    gone = web.list("list.csv", [web.page(f"gone{n}", bare("410 Gone")) for n in range(3)])
    with pytest.raises(NoImages, match="address_not_allowed 3"):
        web.run(gone, fetch={"allow_hosts": ()})
    ask_again(web.store, STAGE, web.key(gone), "retry", reasons_of("address_not_allowed"))
    for _ in range(2):  # the second time from what the first one learned
        with pytest.raises(NoImages, match="not_found 3"):
            web.run(gone)
        assert asked_again(web.store, NODE, web.key(gone)) is None


def test_what_could_be_had_now(web: Web) -> None:
    def silent(peer: socket.socket, _: int) -> None:
        time.sleep(1.0)
        peer.sendall(ok(png(7)))

    pages = {"slow": silent, "busy": bare("503 Busy"), "closed": bare("403 Forbidden"), "many": bare("429 Slow Down")}
    rows = [*web.pairs(0, 1), *(web.page(name, answer) for name, answer in pages.items())]
    hop = f"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: http://{web.hostile.host}/0\r\n\r\n".encode()
    rows += [web.page("moved", hop), ("http://10.0.0.1/x.png", "private")]
    listed = web.list("list.csv", rows)
    artifact = web.run(listed, fetch={"timeout_s": 0.4, "max_redirects": 0})
    assert artifact.counts.failed == dict.fromkeys(
        ("forbidden", "server_error", "throttled", "timeout", "too_many_redirects"), 1
    )

    def now(**fetch: Any) -> dict[str, int]:
        return curable(artifact.units, web.spec(fetch={"timeout_s": 0.4, "max_redirects": 0, **fetch}))

    assert now() == now(timeout_s=0.3) == now(threads=1) == now(allow_hosts=()) == {}
    assert now(timeout_s=5.0) == {"timeout": 1}
    assert now(attempts=2) == {"server_error": 1, "throttled": 1, "timeout": 1}
    assert now(max_redirects=1) == {"too_many_redirects": 1}
    assert now(contact="me@a.example") == now(user_agent="x/1") == {"forbidden": 1, "throttled": 1}
    assert now(allow_hosts=(web.hostile.host, "10.0.0.1:80")) == {"address_not_allowed": 1}
    assert now(attempts=2, user_agent="x/1")["throttled"] == 1
    # Asked again under better manners, what is left was asked under those.
    ask_again(web.store, STAGE, artifact.key, "retry", reasons_of("timeout,too_many_redirects"))
    better = web.run(listed, fetch={"timeout_s": 5.0, "max_redirects": 1})
    assert web.asked == ["0", "moved", "slow"]
    assert curable(better.units, web.spec(fetch={"timeout_s": 5.0, "max_redirects": 1})) == {}
    assert curable(better.units, web.spec(fetch={"timeout_s": 5.0, "max_redirects": 1, "attempts": 3})) == {
        "server_error": 1,
        "throttled": 1,
    }


# -- deaths ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("why", ["increment", "retry"])
def test_killed_in_the_middle(web: Web, why: str) -> None:
    """The driver dies while one shard waits for an answer; what was finished or known is asked for no more."""
    released = threading.Event()

    def late(peer: socket.socket, times: int) -> None:
        if why == "retry" and times == 1:
            peer.sendall(bare("503 Busy"))
        elif released.wait(120):
            peer.sendall(ok(png(500)))

    rows = [*web.pairs(0, 3), web.page("flaky", recovering), *web.pairs(4, 7), web.page("late", late)]
    listed = str(web.folder / "list.csv")
    if why == "increment":
        web.run(web.list("list.csv", [*rows[:3], *rows[4:7]]))
        web.list("list.csv", rows)
        expected = {"flaky", "late"}
    else:
        before = web.run(web.list("list.csv", rows))
        ask_again(web.store, STAGE, before.key, "retry", reasons_of("transient"))
        expected = {"flaky", "late"}
    known = {path.parent.name for path in Path(web.store.root).glob("acquire/units/*/record.json")}
    web.hostile.requests.clear()
    spec = web.spec(fetch={"timeout_s": 100.0})
    source = UrlsSource(kind="urls", files=(listed,))
    arguments = [spec.model_dump_json(), source.model_dump_json(), web.store.url]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline_s = time.monotonic() + 120
    while {p.parent.name for p in Path(web.store.root).glob("acquire/units/*/record.json")} <= known:
        assert driver.poll() is None, "the driver ended before it could be killed"
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert set(web.asked) <= expected
    assert "flaky" in web.asked
    released.set()
    artifact = web.run(listed)
    assert web.asked == ["late"]
    assert artifact.counts.kept == 7 + (why == "retry")
    assert asked_again(web.store, NODE, artifact.key) is None


# -- other sources -----------------------------------------------------------------------------------------------------


def test_a_folder_reads_what_is_new(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(7):
        (folder / f"red {'abcdefg'[number]}.png").write_bytes(png(number))
    source = FolderSource(kind="folder", path=str(folder), captions="filename")
    spec = AcquireSpec(shard_size=SHARD_SIZE, fetch=Fetch(threads=2), image=ImageFormat(size_px=16))
    store = Store(tmp_path / "store")
    acquire(spec, source, {}, store, LogReport(), Execution())
    (folder / "a first.png").write_bytes(png(100))  # so that every shard is another
    (folder / "red c.png").write_bytes(png(103))
    artifact = acquire(spec, source, {}, store, LogReport(), Execution())
    assert [unit.info["taken_over"] for unit in artifact.units] == [2, 4]
    fresh = acquire(spec, source, {}, Store(tmp_path / "fresh"), LogReport(), Execution())
    assert fresh.revision == artifact.revision
    assert tars(store, artifact) == tars(Store(tmp_path / "fresh"), fresh)


def test_the_gallery_takes_over_what_it_had(tmp_path: Path, free_port: int) -> None:
    def gallery(limit: int, fault_rate: float) -> Artifact:
        source = GallerySource(kind="gallery", port=free_port, limit=limit, fault_rate=fault_rate)
        fetch = Fetch(timeout_s=4.0, attempts=2, max_pixels=4_000_000, allow_hosts=(f"127.0.0.1:{free_port}",))
        spec = AcquireSpec(shard_size=20, fetch=fetch, image=ImageFormat(size_px=16))
        return acquire(spec, source, {}, store, LogReport(), Execution())

    store = Store(tmp_path / "store")
    first = gallery(30, 0.0)
    second = gallery(50, 0.2)
    taken = sum(unit.info["taken_over"] for unit in second.units)
    links = [row["url"].split("/")[3] for row in rows_of(store, second)]
    assert first.counts.kept == 30
    assert 30 - len([link for link in links if link != "plain"]) <= taken <= 30


def test_units_of_before_are_left_alone(web: Web) -> None:
    """A store with shards of an older format, and with rubbish where units are."""
    listed = web.list("list.csv", web.pairs(0, 3))
    web.store.publish_bytes("acquire/units/rubbish/record.json", b"{}")
    web.store.publish_bytes("acquire/units/empty/other", b"")
    web.store.publish_bytes("acquire/revisions/rubbish/units.parquet", b"PAR1")
    assert web.run(listed).counts.kept == 3
    (unit,) = web.run(web.list("list.csv", web.pairs(0, 4))).units
    assert unit.info["taken_over"] == 3
    shutil.rmtree(Path(web.store.root, "acquire/revisions"))
    (unit,) = web.run(web.list("list.csv", web.pairs(1, 4))).units
    assert (unit.info["taken_over"], web.asked) == (3, [])


def test_rows_of_lists_with_other_columns(web: Web) -> None:
    rows = web.pairs(0, 3)
    plain = web.list("plain.csv", rows)
    web.run(plain)
    path = web.folder / "typed.parquet"
    urls, captions = zip(*rows, strict=True)
    pq.write_table(pa.table({"url": urls, "caption": captions, "score": [0.1, 0.2, 0.3]}), path)
    web.hostile.requests.clear()
    source = UrlsSource(kind="urls", files=(str(path),), keep_columns=("score",))
    artifact = acquire(web.spec(), source, {}, web.store, LogReport(), Execution())
    assert web.asked == []
    assert [row["score"] for row in rows_of(web.store, artifact)] == [0.1, 0.2, 0.3]
