"""The history of runs: what a run leaves on record however it ends, and what is read from it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from asked import asked

from infra.storage import Store, StoreUnwritable
from pipelines.artifacts import Artifact, ArtifactError, Counts, sealed
from pipelines.building import building
from pipelines.errors import Interrupted, LatentworksError
from pipelines.publishing import publish_unit
from pipelines.workflow import records
from pipelines.workflow.plan import remember
from pipelines.workflow.records import newest_release, newest_runs, read_run, record_path, recorded_run, run_ids


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def publish(store: Store, node: str, content: str) -> Artifact:
    with building(store, node, asked({"content": content}), {}, {}, 1) as build:
        key = build.unit_key({"content": content})
        return build.publish([publish_unit(store, node, key, {"note.txt": content.encode()}, Counts(1, 1))])


def only(store: Store, recipe: str = "small") -> records.RunRecord:
    (run_id,) = run_ids(store, recipe)
    return read_run(store, recipe, run_id)


def test_a_run_that_is_done_says_what_it_made(store: Store) -> None:
    acquired, selected = publish(store, "acquire", "a"), publish(store, "select", "b")
    with recorded_run(store, "small", ["a.b=1"], "select", ["acquire"], ["timeout"]) as recorder:
        at_work = only(store)
        assert (at_work.state, at_work.nodes) == ("running", {})
        recorder.have("acquire", acquired, made=True, duration_s=1.5)
        recorder.have("select", selected, made=False)
    run = only(store)
    assert (run.state, run.error, run.release) == ("done", None, None)
    assert (run.overrides, run.until, run.force, run.retry) == (("a.b=1",), "select", ("acquire",), ("timeout",))
    assert (run.made, list(run.nodes)) == (("acquire",), ["acquire", "select"])
    assert run.nodes["acquire"].revision == acquired.revision
    assert 0 <= run.duration_s < 60
    assert read_run(store, "small", run.id) == run


@pytest.mark.parametrize(
    ("error", "state", "line"),
    [
        (LatentworksError("no room\nand more"), "failed", "no room"),
        (ValueError(), "failed", "ValueError"),
        (KeyboardInterrupt(), "interrupted", None),
        (Interrupted(), "interrupted", None),
        (SystemExit(3), "failed", "3"),
    ],
)
def test_how_a_run_ends_is_on_record(local: Store, error: BaseException, state: str, line: str | None) -> None:
    made = publish(local, "acquire", "a")
    with suppress(type(error)), recorded_run(local, "small", []) as recorder:
        recorder.have("acquire", made, made=True, duration_s=2.0)
        raise error
    run = only(local)
    assert (run.state, run.error, run.made) == (state, line, ("acquire",))


def test_an_error_of_a_thousand_lines_is_one_short_one(local: Store) -> None:
    with pytest.raises(RuntimeError), recorded_run(local, "small", []):
        raise RuntimeError("x" * 10_000)
    assert len(only(local).error or "") == 300


RUN = """
import sys, time
from infra.storage import Store
from pipelines.workflow.records import recorded_run
with recorded_run(Store(sys.argv[1]), "small", []):
    print("running", flush=True)
    time.sleep(600)
"""


def test_a_run_that_was_killed_shows_as_killed(local: Store) -> None:
    with subprocess.Popen([sys.executable, "-c", RUN, local.url], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert only(local).state == "running"
        os.kill(process.pid, signal.SIGKILL)
    assert only(local).state == "killed"


def test_a_process_of_the_same_number_is_not_the_run(local: Store) -> None:
    with recorded_run(local, "small", []) as recorder:
        earlier = replace(recorder.record, process_started_s=recorder.record.process_started_s - 1000)
        local.publish_bytes(record_path("small", earlier.id), sealed(earlier.to_json()))
        assert only(local).state == "killed"


def test_a_run_elsewhere_is_known_by_its_heartbeat(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "HEARTBEAT_S", 0.05)
    with recorded_run(local, "small", []) as recorder:
        began = recorder.record.beat_s
        deadline_s = time.monotonic() + 30
        while only(local).beat_s == began:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    elsewhere = replace(recorder.record, host="elsewhere", state="running", beat_s=time.time())
    for silent_s, state in ((0, "running"), (records.SILENT_AFTER_S + 5, "killed")):
        there = replace(elsewhere, beat_s=elsewhere.beat_s - silent_s)
        local.publish_bytes(record_path("small", there.id), sealed(there.to_json()))
        assert only(local).state == state


def test_a_store_that_goes_away_ends_no_run(local: Store) -> None:
    made = publish(local, "acquire", "a")
    with recorded_run(local, "small", []) as recorder:
        folder = Path(local.location("recipes"))
        folder.rename(folder.with_name("away"))
        folder.write_bytes(b"in the way")
        recorder.have("acquire", made, made=True)
    with pytest.raises(StoreUnwritable), recorded_run(local, "small", []):
        pass


def test_runs_come_newest_first_and_a_damaged_record_hides_no_other(local: Store) -> None:
    ids = []
    for _ in range(5):
        with recorded_run(local, "small", []) as recorder:
            ids.append(recorder.record.id)
    assert run_ids(local, "small") == ids
    path = record_path("small", ids[2])
    whole = json.loads(local.read_bytes(path))
    spoilt = [
        b"rubbish",
        sealed({}),
        sealed(dict.fromkeys(whole)),
        sealed(whole | {"state": "asleep"}),
        sealed(whole | {"nodes": [{}]}),
        local.read_bytes(record_path("small", ids[1])),
    ]
    for data in spoilt:
        local.publish_bytes(path, data)
        assert [run.id for run in newest_runs(local, "small")] == [ids[4], ids[3], ids[1], ids[0]]
    local.delete(path)
    Path(local.location(path)).mkdir()
    assert [run.id for run in newest_runs(local, "small")] == [ids[4], ids[3], ids[1], ids[0]]
    assert list(newest_runs(local, "other")) == []


def test_the_newest_release_is_that_of_the_newest_run_that_has_one(local: Store) -> None:
    assert newest_release(local, "small") is None
    by_hand = publish(local, "release", "by hand")
    remember(local, "small", "release", by_hand)
    assert newest_release(local, "small") == by_hand
    released = [publish(local, "release", name) for name in ("first", "second")]
    for one in (*released, None):
        with recorded_run(local, "small", []) as recorder:
            if one is not None:
                recorder.have("release", one, made=True)
    found = newest_release(local, "small")
    assert found is not None
    assert (found.revision, found.key) == (released[1].revision, released[1].key)
    local.delete(released[1].path)
    with pytest.raises(ArtifactError, match="ldm store verify"):
        newest_release(local, "small")
