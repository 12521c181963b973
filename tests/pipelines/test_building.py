"""Making artifacts: again, after kills, from damaged inputs; and how few requests it takes to find that all is made."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asked import asked

from infra.locks import Locked, lock
from infra.storage import StorageError, Store
from pipelines.again import Again, ask_again, asked_again
from pipelines.artifacts import (
    Artifact,
    Counts,
    Damaged,
    Unit,
    find,
    find_unit,
    load,
    read_sealed,
    sealed,
)
from pipelines.building import COLLECTING, Build, InputsDamaged, begun_path, building, check_inputs
from pipelines.publishing import publish_unit

INFO = {"floats": 1e-05, "words": "naïve\n", "by_size": {10: 1, 9: 2}, "none": None}


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def unit_of(build: Build, content: str, made: list[str] | None = None) -> Unit:
    """The unit made from `content`; what had to be made is added to `made`."""
    key = build.unit_key({"content": content})
    found = build.find_unit(key)
    if found is None:
        if made is not None:
            made.append(content)
        files: dict[str, Path | bytes] = {"a/data.bin": content.encode() * 100, "b.txt": content.encode()}
        found = publish_unit(build.store, build.stage, key, files, Counts(1, 1), INFO)
    return found


def make(
    store: Store,
    contents: str,
    spec: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Artifact] | None = None,
    made: list[str] | None = None,
    stage: str = "demo",
) -> Artifact:
    with building(store, stage, asked(spec), inputs or {}, {}, 1) as build:
        return build.publish([unit_of(build, content, made) for content in contents])


# -- sealed files ------------------------------------------------------------------------------------------------------


def flipped(data: bytes, place: int) -> bytes:
    return data[: place // 8] + bytes([data[place // 8] ^ 1 << place % 8]) + data[place // 8 + 1 :]


def test_every_flipped_bit_of_a_sealed_file_is_noticed(local: Store) -> None:
    data = sealed(INFO)
    local.publish_bytes("file", data)
    assert read_sealed(local, "file")["floats"] == 1e-05
    for place in range(8 * len(data)):
        Path(local.location("file")).write_bytes(flipped(data, place))
        with pytest.raises(Damaged, match="file is not what was written"):
            read_sealed(local, "file")


@pytest.mark.parametrize("rubbish", [b"", b"null", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"sum": "0"}'])
def test_rubbish_is_damage_and_nothing_else(local: Store, rubbish: bytes) -> None:
    local.publish_bytes("file", rubbish)
    with pytest.raises(Damaged):
        read_sealed(local, "file")


@pytest.mark.parametrize("file", ["keys/{key}.json", "revisions/{revision}/manifest.json"])
def test_a_damaged_answer_is_made_again_from_the_units_there_are(local: Store, file: str) -> None:
    first = make(local, "xy")
    path = "demo/" + file.format(key=first.key, revision=first.revision)
    data = local.read_bytes(path)
    local.publish_bytes(path, flipped(data, 8 * (len(data) // 2)))
    assert find(local, "demo", first.key) is None
    made: list[str] = []
    second = make(local, "xy", made=made)
    assert made == []
    assert (second.revision, second.units) == (first.revision, first.units)
    assert find(local, "demo", first.key) == second


@pytest.mark.parametrize("table", ["units.parquet", "files.parquet"])
def test_publishing_mends_damaged_tables_of_an_equal_revision(local: Store, table: str) -> None:
    first = make(local, "xy")
    whole = local.read_bytes(f"{first.path}/{table}")
    local.publish_bytes(f"{first.path}/{table}", flipped(whole, 8 * (len(whole) // 2)))
    assert find(local, "demo", first.key) is not None  # from the manifest alone
    second = make(local, "xy", {"another": "question"})
    assert second.revision == first.revision
    assert local.read_bytes(f"{first.path}/{table}") == whole


def test_a_flipped_bit_in_the_list_of_units_is_no_other_list(local: Store) -> None:
    first = make(local, "xy")
    path = f"{first.path}/units.parquet"
    whole = local.read_bytes(path)
    for place in range(0, 8 * len(whole), 97):
        Path(local.location(path)).write_bytes(flipped(whole, place))
        with pytest.raises(Damaged, match=r"units.parquet is not what was written; `ldm store verify"):
            load(local, "demo", first.revision).units  # noqa: B018


def test_a_list_of_units_that_is_replaced_while_it_is_read_is_not_damaged(local: Store) -> None:
    make(local, "x")
    reader = find(local, "demo", make(local, "x").key)
    assert reader is not None
    ask_again(local, "demo", reader.key, "force")
    newer = make(local, "x")
    assert newer.revision == reader.revision
    assert reader.units == newer.units


def test_a_store_that_does_not_answer_says_nothing_of_what_is_made(local: Store) -> None:
    """It is no reason to make everything again."""
    made = make(local, "x")
    for path in (f"demo/keys/{made.key}.json", f"demo/units/{made.units[0].key}/record.json"):
        data = local.read_bytes(path)
        local.delete(path)
        local.publish_bytes(f"{path}/in-the-way", b"")  # reading a folder fails as a network does
        with pytest.raises(StorageError):
            find(local, "demo", made.key) if "keys" in path else find_unit(local, "demo", made.units[0].key)
        local.delete(path)
        local.publish_bytes(path, data)


def test_a_record_in_another_units_folder_is_no_record(local: Store) -> None:
    unit = make(local, "x").units[0]
    local.publish_bytes("demo/units/other/record.json", local.read_bytes(f"demo/units/{unit.key}/record.json"))
    assert find_unit(local, "demo", "other") is None


# -- one revision, two questions ---------------------------------------------------------------------------------------


def test_what_belongs_to_the_question_is_in_its_answer(local: Store) -> None:
    """The revision's manifest is of whoever published it first."""
    old, new = make(local, "1", stage="source"), make(local, "2", stage="source")
    first = make(local, "x", {"rule": 1}, {"source": old})
    second = make(local, "x", {"rule": 2}, {"source": new})
    assert second.revision == first.revision
    found = find(local, "demo", second.key)
    assert found == second
    assert found is not None
    assert found.manifest["inputs"] == {"source": new.revision}
    assert found.settings == {"rule": 2}
    again = find(local, "demo", first.key)
    assert again is not None
    assert (again.manifest["inputs"], again.settings) == ({"source": old.revision}, {"rule": 1})


def test_what_was_made_twice_is_named_in_the_answer(local: Store) -> None:
    """So that it counts as no interrupted work, and may go."""
    (first,) = make(local, "x").units
    with building(local, "demo", asked({"rule": 2}), {}, {}, 1) as build:
        copy = publish_unit(local, "demo", build.unit_key({"other": 1}), {"data": b"x"}, Counts(1, 1), {"content": 1})
        twin = publish_unit(local, "demo", build.unit_key({"other": 2}), {"data": b"x"}, Counts(1, 1), {"content": 1})
        build.publish([copy])
    with building(local, "demo", asked({"rule": 3}), {}, {}, 1) as build:
        assert [unit.key for unit in build.publish([twin]).units] == [copy.key]
    assert read_sealed(local, f"demo/keys/{build.key}.json")["besides"] == [twin.key]
    key = make(local, "x").key
    for _ in range(2):
        ask_again(local, "demo", key, "force")
        make(local, "x")
    besides = read_sealed(local, f"demo/keys/{key}.json")["besides"]
    assert len(besides) == 2
    assert first.key in besides


# -- again -------------------------------------------------------------------------------------------------------------


def test_a_forced_build_that_was_killed_goes_on(store: Store) -> None:
    first = make(store, "xyz")
    before = {unit.key for unit in first.units}
    ask_again(store, "demo", first.key, "force")
    made: list[str] = []
    with suppress(KeyboardInterrupt), building(store, "demo", asked(), {}, {}, 1) as build:
        unit_of(build, "x", made)
        raise KeyboardInterrupt
    assert find(store, "demo", first.key) is None
    ask_again(store, "demo", first.key, "force")  # the same command again
    second = make(store, "xyz", made=made)
    assert made == ["x", "y", "z"]
    assert not {unit.key for unit in second.units} & before
    third = make(store, "xyzw", {"more": 1}, made=made)
    assert made == ["x", "y", "z", "w"], "later runs find the newer units"
    assert {unit.key for unit in second.units} <= {unit.key for unit in third.units}


@pytest.mark.parametrize("stop_at", range(1, 8))
def test_publishing_that_dies_anywhere_goes_on(local: Store, stop_at: int) -> None:
    """After any number of writes: nothing half is found, and the next run makes no unit twice."""
    first = make(local, "xy")
    ask_again(local, "demo", first.key, "force")
    made: list[str] = []
    with building(local, "demo", asked(), {}, {}, 1) as build:
        units = [unit_of(build, content, made) for content in "xy"]
        build.store = _DiesAfter(local.url, stop_at)
        with suppress(MemoryError):
            build.publish(units)
    found = find(local, "demo", first.key)
    assert found is None or found.units == tuple(units)
    assert make(local, "xy", made=made).units == tuple(units)
    assert made == ["x", "y"]
    assert asked_again(local, "demo", first.key) is None


class _DiesAfter(Store):
    def __init__(self, url: str, writes: int) -> None:
        super().__init__(url)
        self.left = writes

    def publish_bytes(self, path: str, data: bytes) -> None:
        self.left -= 1
        if self.left < 0:
            raise MemoryError
        super().publish_bytes(path, data)


def test_what_was_asked_for_adds_up(local: Store) -> None:
    def after(*asked_for: tuple[Any, ...]) -> Again:
        local.delete("demo/keys/k.again")
        for why, *reasons in asked_for:
            ask_again(local, "demo", "k", why, reasons)
        again = asked_again(local, "demo", "k")
        assert again is not None
        return again

    def told(*asked_for: tuple[Any, ...]) -> tuple[str, tuple[str, ...]]:
        again = after(*asked_for)
        return again.why, again.reasons

    assert told(("force",), ("retry", "timeout")) == ("force", ())
    assert told(("force",), ("repair",)) == ("force", ())
    assert told(("retry", "timeout"), ("repair",)) == ("retry", ("timeout",))
    assert told(("repair",), ("retry", "b", "a")) == ("retry", ("a", "b"))
    assert told(("retry", "timeout"), ("retry", "broken")) == ("retry", ("broken", "timeout"))
    assert told(("retry",), ("retry", "broken")) == ("retry", ()), "all reasons stay all"
    assert told(("retry", "timeout"), ("force",)) == ("force", ())
    salt = after(("retry", "a", "b")).salt
    for reasons in (["b", "a"], ["a"]):
        ask_again(local, "demo", "k", "retry", reasons)
        again = asked_again(local, "demo", "k")
        assert again is not None
        assert again.salt == salt, "it goes on, and isn't begun anew"


def test_what_is_asked_for_while_it_is_made_is_not_lost(local: Store) -> None:
    first = make(local, "x")
    ask_again(local, "demo", first.key, "repair")
    with building(local, "demo", asked(), {}, {}, 1) as build:
        units = [unit_of(build, "x")]
        ask_again(local, "demo", first.key, "force")
        build.publish(units)
    again = asked_again(local, "demo", first.key)
    assert again is not None
    assert again.why == "force"
    with building(local, "other", asked(), {}, {}, 1) as build:
        units = [unit_of(build, "x")]
        ask_again(local, "other", build.key, "force")
        build.publish(units)
    assert find(local, "other", build.key) is None


def test_a_damaged_wish_is_the_least_of_wishes_and_can_be_wished_again(local: Store) -> None:
    first = make(local, "x")
    ask_again(local, "demo", first.key, "retry", ["timeout"])
    path = f"demo/keys/{first.key}.again"
    local.publish_bytes(path, local.read_bytes(path)[:-5])
    assert find(local, "demo", first.key) is None
    assert asked_again(local, "demo", first.key) == Again("repair", "")
    made: list[str] = []
    make(local, "x", made=made)
    assert made == []
    assert find(local, "demo", first.key) is not None
    local.publish_bytes(path, b"rubbish")
    ask_again(local, "demo", first.key, "force")
    again = asked_again(local, "demo", first.key)
    assert again is not None
    assert again.why == "force"


def test_a_renewed_unit_that_can_not_be_known_is_not_replaced_by_its_forerunner(local: Store) -> None:
    """The older one may have what was taken down since."""
    first = make(local, "x")
    ask_again(local, "demo", first.key, "force")
    make(local, "x")
    (alias,) = local.listdir("demo/renewed")
    data = local.read_bytes(f"demo/renewed/{alias}")
    local.publish_bytes(f"demo/renewed/{alias}", flipped(data, 40))
    with pytest.raises(Damaged, match=r"renewed.*`ldm store verify RECIPE --repair`"):
        make(local, "x", {"more": 1})


def test_only_units_that_are_published_take_anothers_place(local: Store) -> None:
    first = make(local, "xy")
    ask_again(local, "demo", first.key, "force")
    with building(local, "demo", asked(), {}, {}, 1) as build:
        keys = {content: build.unit_key({"content": content}) for content in "xy"}
        build.publish([unit_of(build, "x")])
    aliases = [read_sealed(local, f"demo/renewed/{name}")["unit"] for name in local.listdir("demo/renewed")]
    assert aliases == [keys["x"]]


# -- inputs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contents", ["x", "xyzuvw"])
def test_inputs_with_too_little_in_them_are_refused_at_once(store: Store, contents: str) -> None:
    source = make(store, contents, stage="source")
    check_inputs(store, {"source": source})
    lost, short = source.units[0].path("a/data.bin"), source.units[-1].path("b.txt")
    store.delete(lost)
    store.publish_bytes(short, b"")
    began = []
    with pytest.raises(InputsDamaged) as raised, building(store, "demo", asked(), {"source": source}, {}, 1):
        began.append(1)
    assert not began
    message = str(raised.value)
    assert f"{store.location(lost)} is missing" in message
    assert f"{store.location(short)} has 0 of 1 bytes" in message
    assert "`ldm store verify RECIPE --repair`, then `ldm run RECIPE` again" in message


def test_many_faults_are_counted(local: Store) -> None:
    source = make(local, "abcdef", stage="source")
    for unit in source.units:
        local.delete(f"source/units/{unit.key}")
    with pytest.raises(InputsDamaged, match="and 9 more; "):
        check_inputs(local, {"source": source})


def test_inputs_are_checked_by_one_listing(
    s3_url: str, caplog: pytest.LogCaptureFixture, requests: Callable[[], int]
) -> None:
    store = Store(s3_url)
    counts = []
    for contents in ("ab", "abcdefghijklmnop"):
        source = make(store, contents, stage="source")
        source.units  # noqa: B018
        requests()
        check_inputs(store, {"source": source})
        counts.append(requests())
    assert counts[0] == counts[1] <= 2


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def requests(caplog: pytest.LogCaptureFixture) -> Callable[[], int]:
    """How many requests the S3 server had since the last call, by its own log."""

    def count() -> int:
        number = sum(record.name == "werkzeug" for record in caplog.records)
        caplog.clear()
        return number

    caplog.set_level(logging.INFO, logger="werkzeug")
    return count


def test_seeing_that_nothing_is_to_do_takes_as_many_requests_for_one_unit_as_for_many(
    s3_url: str, requests: Callable[[], int]
) -> None:
    store = Store(s3_url)
    counts = []
    for contents in ("a", "abcdefghijkl"):
        key = make(store, contents, {"contents": contents}).key
        requests()
        assert find(store, "demo", key) is not None
        counts.append(requests())
    assert counts[0] == counts[1]
    assert counts[0] <= 8


# -- with others at it -------------------------------------------------------------------------------------------------


def test_what_was_begun_is_known_until_it_is_published(store: Store) -> None:
    source = make(store, "1", stage="source")
    with suppress(ZeroDivisionError), building(store, "demo", asked(), {"source": source}, {}, 1) as build:
        at_work = read_sealed(store, begun_path("demo", build.key))
        unit = unit_of(build, "x")
        raise ZeroDivisionError
    assert (at_work["inputs"], at_work["units"]) == ({"source": source.revision}, None)
    assert read_sealed(store, begun_path("demo", build.key))["units"] == [unit.key]
    make(store, "x", inputs={"source": source})
    assert not store.exists(begun_path("demo", build.key))


def test_nothing_is_begun_while_a_store_is_collected(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.building.COLLECTING_WAIT_S", 0.0)
    with lock(local, COLLECTING), pytest.raises(Locked), building(local, "demo", asked(), {}, {}, 1):
        pass
    make(local, "x")


def test_a_revision_published_by_two_at_once_is_whole(local: Store) -> None:
    """Two questions with one answer, whose units have other keys."""

    def publish(number: int, side: str, start: threading.Barrier) -> None:
        with building(local, "demo", asked({"number": number, "side": side}), {}, {}, 1) as build:
            key = build.unit_key({"side": side, "number": number})
            unit = publish_unit(local, "demo", key, {"data": f"{number}".encode()}, Counts(1, 1))
            start.wait()
            revisions.append(build.publish([unit]).revision)

    for number in range(3):
        revisions: list[str] = []
        start = threading.Barrier(2)
        sides = [threading.Thread(target=publish, args=(number, side, start)) for side in "ab"]
        for side in sides:
            side.start()
        for side in sides:
            side.join()
        assert revisions[0] == revisions[1]
        made = load(local, "demo", revisions[0])
        listed = local.read_bytes(f"{made.path}/files.parquet")
        assert hashlib.sha256(listed).hexdigest() == made.manifest["tables"]["files.parquet"]
        assert len(made.units) == 1


def test_artifacts_travel(local: Store) -> None:
    import pickle

    made = make(local, "xy")
    there = pickle.loads(pickle.dumps(made))
    assert there.units == made.units
    assert replace(there, store=local) == made


def test_manifests_are_of_numbers_that_json_has(local: Store) -> None:
    with building(local, "demo", asked(), {}, {}, 1) as build, pytest.raises(ValueError, match="JSON compliant"):
        build.publish([unit_of(build, "x")], info={"figure": float("nan")})
    assert find(local, "demo", build.key) is None
    assert json.loads(sealed({"a": {2: 1, 10: 1}}))["a"] == {"2": 1, "10": 1}
