"""What nothing reaches goes, and nothing else; whoever dies, or begins, in the middle of it."""

from __future__ import annotations

import itertools
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from made import MadeRecipe

from infra.locks import lock
from infra.storage import Store
from pipelines.again import ask_again
from pipelines.artifacts import Artifact, Counts, find, read_sealed, sealed
from pipelines.building import building, check_inputs
from pipelines.publishing import publish_unit
from pipelines.workflow.collection import Doomed, collect, collecting, doomed
from pipelines.workflow.graph import build_graph
from pipelines.workflow.plan import plan
from pipelines.workflow.reach import DAY_S, UnknownReach
from pipelines.workflow.records import recorded_run
from pipelines.workflow.verification import verify


@pytest.fixture(autouse=True)
def _no_plug_is_pulled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is most of what publishing small files takes."""
    monkeypatch.setattr("infra.storage._fsync", lambda path: None)


@pytest.fixture
def made(tmp_path: Path) -> MadeRecipe:
    return MadeRecipe(tmp_path)


def run(made: MadeRecipe, number: int, **more: Any) -> dict[str, Artifact]:
    """A run on record, whose settings and pictures are of its number; neighbours share a shard."""
    overrides = [f"acquire.shard_size={10 + number}"]
    with recorded_run(made.store, "small", overrides) as recorder:
        artifacts = made.make(*overrides, images=(f"shard {number}", f"shard {number + 1}"), **more)
        for name, artifact in artifacts.items():
            recorder.have(name, artifact, made=True)
    return artifacts


def found(made: MadeRecipe, *overrides: str, keep: int = 3, unfinished: bool = False, now_s: float = 0) -> list[Doomed]:
    recipe = made.recipe(*overrides)
    nodes = build_graph(recipe)
    current = [row.artifact for row in plan(nodes, made.store, recipe.name) if row.artifact is not None]
    return doomed(made.store, nodes, current, keep, unfinished, now_s or time.time())


def gc(made: MadeRecipe, *overrides: str, store: Store | None = None, **options: Any) -> list[str]:
    with collecting(made.store):
        return collect(store or made.store, found(made, *overrides, **options))


def is_whole(made: MadeRecipe, artifacts: dict[str, Artifact]) -> bool:
    """Whether all of it is found, and all its files are there."""
    for name, artifact in artifacts.items():
        if find(made.store, name, artifact.key) is None:
            return False
    check_inputs(made.store, artifacts)
    return True


def is_gone(made: MadeRecipe, artifact: Artifact) -> bool:
    return find(made.store, artifact.stage, artifact.key) is None and not made.store.exists(artifact.path)


def check_nothing_looks_complete_that_is_not(made: MadeRecipe) -> None:
    files = made.files()
    for path in files:
        node, kind, *_ = path.split("/")
        if path.endswith("/record.json"):
            folder = path.removesuffix("record.json")
            for name, *_ in read_sealed(made.store, path)["files"]:
                assert folder + name in files, path
        elif path.endswith("/manifest.json") and kind == "revisions":
            revision = path.split("/")[2]
            assert {f"{node}/revisions/{revision}/{name}.parquet" for name in ("units", "files")} <= files
        elif kind == "keys" and path.endswith(".json"):
            artifact = find(made.store, node, path.split("/")[2].removesuffix(".json"))
            assert artifact is not None, path
            check_inputs(made.store, {node: artifact})


# -- what stays and what goes ------------------------------------------------------------------------------------------


def test_the_newest_runs_stay_and_what_only_older_ones_had_goes(made: MadeRecipe) -> None:
    runs = [run(made, number) for number in range(6)]
    units = [{unit.key for unit in one["acquire"].units} for one in runs]
    made.age(2)
    before = made.files()
    told = found(made, "acquire.shard_size=15")
    assert made.files() == before, "telling deletes nothing"
    assert gc(made, "acquire.shard_size=15") == []
    for number in (3, 4, 5):
        assert is_whole(made, runs[number])
    for number in (0, 1, 2):
        for artifact in runs[number].values():
            assert is_gone(made, artifact)
    left = {path.split("/")[2] for path in made.files() if path.startswith("acquire/units/")}
    assert left == set.union(*units[3:]), "shard 3, of a run that goes too, stays"
    freed = sum(one.size_bytes for one in told)
    assert freed > 0
    check_nothing_looks_complete_that_is_not(made)
    assert all(one.is_empty for one in found(made, "acquire.shard_size=15"))


def test_nothing_younger_than_a_day_goes_nor_what_it_was_made_from(made: MadeRecipe) -> None:
    runs = [run(made, number) for number in range(3)]
    made.age(2)
    for path in Path(made.store.url).glob("train.autoencoder/keys/*.json"):
        path.touch()  # asked for today, whoever made it when
    assert all(one.is_empty for one in found(made, keep=1))
    assert all(is_whole(made, one) for one in runs)


def test_all_recipes_in_the_store_count(made: MadeRecipe) -> None:
    mine = run(made, 0)
    theirs = run(made, 5)
    for path in made.path("recipes/small").rglob("*.json"):  # the other one is somebody else's
        value = read_sealed(made.store, path.relative_to(made.store.url).as_posix())
        text = str(value)
        if any(artifact.revision in text for artifact in theirs.values()):
            name = path.relative_to(made.path("recipes/small")).as_posix()
            made.store.publish_bytes(f"recipes/other/{name}", sealed(value))
            path.unlink()
    made.age(2)
    gc(made, "acquire.shard_size=10", keep=1)
    assert is_whole(made, mine)
    assert is_whole(made, theirs)


def test_runs_that_failed_push_no_result_out(made: MadeRecipe) -> None:
    good = [run(made, 0), run(made, 1)]
    for _ in range(5):
        with suppress(ValueError), recorded_run(made.store, "small", []):
            raise ValueError
        run(made, 1)  # the same result, again and again
    made.age(2)
    gc(made, "acquire.shard_size=11", keep=2)
    assert all(is_whole(made, one) for one in good)


def test_what_a_run_has_so_far_stays_if_it_is_killed(made: MadeRecipe) -> None:
    old = run(made, 0)
    for number in range(1, 5):
        run(made, number)
    with (
        suppress(KeyboardInterrupt),
        recorded_run(made.store, "small", ["acquire.shard_size=10"]) as recorder,
    ):
        recorder.have("acquire", old["acquire"], made=False)
        raise KeyboardInterrupt
    made.age(2)
    gc(made, "acquire.shard_size=14", keep=1)
    assert find(made.store, "acquire", old["acquire"].key) is not None
    check_inputs(made.store, {"acquire": old["acquire"]})
    assert is_gone(made, old["select"])


def test_interrupted_work_stays_unless_it_is_given_up(made: MadeRecipe) -> None:
    source = run(made, 0)
    for number in range(1, 5):
        run(made, number)
    recipe = made.recipe("acquire.shard_size=10", "select.duplicates=[]")
    node = build_graph(recipe)["select"]
    with suppress(KeyboardInterrupt), building(made.store, "acquire", node.identity, {}, {}, 1) as build:
        interrupted = [_publish_unit(build, f"picture {number}") for number in range(3)]
        raise KeyboardInterrupt
    with (
        suppress(KeyboardInterrupt),
        building(made.store, "select", node.identity, {"acquire": source["acquire"]}, {}, 1),
    ):
        raise KeyboardInterrupt
    made.store.publish_bytes(f"train.autoencoder/unfinished/{'e' * 32}/checkpoints/000000004/manifest.json", b"{}")
    made.age(2)
    told = gc(made, "acquire.shard_size=14", keep=1)
    assert told == []
    for unit in interrupted:
        assert made.store.exists(unit.only("note.txt"))
    assert find(made.store, "acquire", source["acquire"].key) is not None, "an interrupted build reads it"
    check_inputs(made.store, {"acquire": source["acquire"]})
    assert made.store.listdir("train.autoencoder/unfinished") == ["e" * 32]

    gc(made, "acquire.shard_size=14", keep=1, unfinished=True)
    assert not any(made.store.exists(unit.only("note.txt")) for unit in interrupted)
    assert is_gone(made, source["acquire"])
    assert made.store.listdir("train.autoencoder/unfinished") == []
    assert made.store.listdir("select/begun") == []


def _publish_unit(build: Any, content: str) -> Any:
    key = build.unit_key({"content": content})
    return publish_unit(build.store, build.stage, key, {"note.txt": content.encode()}, Counts(1, 1))


def test_of_a_node_whose_build_was_killed_everything_stays(made: MadeRecipe) -> None:
    """Nobody knows which units it had in mind."""
    runs = [run(made, number) for number in range(4)]
    begun = {"inputs": {}, "units": None, "at": "2026-01-01T00:00:00Z"}
    made.store.publish_bytes(f"acquire/begun/{'b' * 32}.json", sealed(begun))
    made.age(2)
    gc(made, "acquire.shard_size=13", keep=1)
    assert is_whole(made, {"acquire": runs[0]["acquire"]})
    assert is_gone(made, runs[0]["select"])
    gc(made, "acquire.shard_size=13", keep=1, unfinished=True)
    assert is_gone(made, runs[0]["acquire"])
    assert is_whole(made, runs[3])


def test_of_a_node_that_is_made_everything_stays(made: MadeRecipe) -> None:
    runs = [run(made, number) for number in range(4)]
    made.age(2)
    with lock(made.store, f"acquire/{'c' * 32}"):
        gc(made, "acquire.shard_size=13", keep=1, unfinished=True)
    assert is_whole(made, {"acquire": runs[0]["acquire"]})
    assert is_gone(made, runs[0]["select"])


def test_a_build_that_begins_between_telling_and_deleting_is_left_alone(made: MadeRecipe) -> None:
    runs = [run(made, number) for number in range(3)]
    made.age(2)
    with collecting(made.store):
        told = found(made, "acquire.shard_size=12", keep=1)
        with lock(made.store, f"acquire/{'c' * 32}"):
            assert collect(made.store, told) == ["acquire"]
    assert is_whole(made, {"acquire": runs[0]["acquire"]})


def test_a_released_model_stays_for_good_and_what_it_was_made_from_does_not(made: MadeRecipe) -> None:
    runs = [run(made, number) for number in range(3)]
    identity = build_graph(made.recipe())["select"].identity
    trained = runs[0]["train.autoencoder"]
    with building(made.store, "release", identity, {"train.autoencoder": trained}, {}, 1) as build:
        released = build.publish([_publish_unit(build, "a model")])
    made.age(2)
    gc(made, "acquire.shard_size=12", keep=1)
    assert is_whole(made, {"release": released})
    assert is_gone(made, trained)


def test_checkpoints_that_a_longer_training_goes_on_from_stay_with_their_model(made: MadeRecipe) -> None:
    kept, old = run(made, 5)["train.autoencoder"].units[0].key, run(made, 0)["train.autoencoder"].units[0].key
    run(made, 5)
    for unit in (kept, old):
        folder = f"train.autoencoder/unfinished/{unit}"
        made.store.publish_bytes(f"{folder}/checkpoints/000000004/manifest.json", b"{}")
        pointer = {"checkpoints": f"{folder}/checkpoints", "step": 4, "unit": unit, "steps": 4, "max_minutes": None}
        made.store.publish_bytes(f"train.autoencoder/continuable/{unit[::-1]}/000000004.json", sealed(pointer))
    made.age(2)
    gc(made, "acquire.shard_size=15", keep=1)
    assert made.store.listdir("train.autoencoder/unfinished") == [kept]
    pointers = [path for path in made.files() if "/continuable/" in path]
    assert pointers == [f"train.autoencoder/continuable/{kept[::-1]}/000000004.json"]
    for path in pointers:
        made.store.delete(path)
    made.age(2)
    gc(made, "acquire.shard_size=15", keep=1)
    assert made.store.listdir("train.autoencoder/unfinished") == [], "left over of a training that is published"
    assert made.store.exists(f"train.autoencoder/units/{kept}/record.json")


def test_leftovers_go_and_what_is_not_ours_stays(made: MadeRecipe) -> None:
    run(made, 0)
    folder = made.path("acquire/units") / ("d" * 32)
    ours = [folder / "half.tar", made.path("acquire/keys/.x.json.0123.part")]
    foreign = [
        made.path("photos/units/holiday.jpg"),
        made.path("acquire/notes.txt"),
        made.path("acquire/units/readme/hello.txt"),
        made.path(f"acquire/revisions/{'g' * 32}/list.txt"),
        made.path("locks/select/whatever"),
    ]
    for path in ours + foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    gc(made)
    assert all(path.exists() for path in ours), "younger than a day"
    made.age(2)
    gc(made)
    assert not any(path.exists() for path in ours)
    assert all(path.exists() for path in foreign)


def test_units_made_anew_leave_what_leads_to_them(made: MadeRecipe) -> None:
    acquired = run(made, 0)["acquire"]
    ask_again(made.store, "acquire", acquired.key, "force")
    run(made, 0)
    for number in range(1, 5):
        run(made, number)
    aliases = made.store.listdir("acquire/renewed")
    made.age(2)
    gc(made, "acquire.shard_size=14", keep=1)
    assert made.store.listdir("acquire/renewed") == aliases
    assert run(made, 0)["acquire"].revision == acquired.revision


def test_copies_of_what_is_listed_go(made: MadeRecipe) -> None:
    acquired = run(made, 0)["acquire"]
    before = {unit.key for unit in acquired.units}
    ask_again(made.store, "acquire", acquired.key, "force")
    again = run(made, 0)
    assert {path.split("/")[2] for path in made.files() if "acquire/units/" in path} > before
    made.age(2)
    gc(made, "acquire.shard_size=10")
    assert is_whole(made, again)
    assert not {path.split("/")[2] for path in made.files() if "acquire/units/" in path} & before


# -- when it can't be known --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "how"),
    [
        *itertools.product(
            ["manifest.json", "units.parquet", "answer", "remembered", "run"], ["flipped", "folder", "another's"]
        ),
        *(("begun", how) for how in ("flipped", "another's")),
    ],
)
def test_nothing_goes_where_it_can_not_be_known_what_is_needed(made: MadeRecipe, what: str, how: str) -> None:
    for number in range(3):
        newest = run(made, number)["acquire"]
    (run_id, *_) = reversed(made.store.listdir("recipes/small/runs"))
    made.store.publish_bytes(f"select/begun/{'b' * 32}.json", sealed({"inputs": {}, "units": [], "at": ""}))
    path = {
        "answer": f"acquire/keys/{newest.key}.json",
        "remembered": "recipes/small/acquire.json",
        "run": f"recipes/small/runs/{run_id}",
        "begun": f"select/begun/{'b' * 32}.json",
    }.get(what, f"{newest.path}/{what}")
    if how == "flipped":
        made.flip(path)
    elif how == "folder":
        made.store.delete(path)
        made.path(path).mkdir()
    else:
        made.store.publish_bytes(path, sealed({"is": "sealed, and of something else"}))
    made.age(2)
    before = made.files()
    with pytest.raises(UnknownReach, match="nothing is deleted") as raised:
        gc(made, keep=1, unfinished=False)
    assert made.store.location(path) in str(raised.value) or what == "manifest.json"
    assert made.files() == before


def test_links_that_lead_nowhere_are_files_like_others(made: MadeRecipe) -> None:
    """They end no collection, and a record that is one makes no unit look as if it never had been finished."""
    for number in range(3):
        newest = run(made, number)
    unit = publish_unit(made.store, "acquire", "c" * 32, {"note.txt": b"half a download"}, Counts(1, 1))
    for path in (f"acquire/units/{'c' * 32}/record.json", newest["acquire"].units[0].path("note.txt")):
        made.store.delete(path)
        made.path(path).symlink_to(made.path(path).name if path.endswith("txt") else "nowhere")
        os.utime(made.path(path), (0, 0), follow_symlinks=False)
    made.age(2)
    gc(made, "acquire.shard_size=12", keep=1)
    assert made.store.exists(unit.path("note.txt"))
    gc(made, "acquire.shard_size=12", keep=1, unfinished=True)
    assert not made.path(f"acquire/units/{'c' * 32}").exists()


def test_an_old_revision_that_is_damaged_stays_with_its_units(made: MadeRecipe) -> None:
    runs = [run(made, number) for number in range(3)]
    made.flip(f"{runs[0]['acquire'].path}/units.parquet")
    made.age(2)
    gc(made, "acquire.shard_size=12", keep=1)
    assert made.store.exists(f"{runs[0]['acquire'].path}/manifest.json")
    gc(made, "acquire.shard_size=12", keep=1, unfinished=True)
    assert not made.store.exists(runs[0]["acquire"].path)
    assert is_whole(made, runs[2])


# -- deaths and races --------------------------------------------------------------------------------------------------


class _Dies(Exception):
    pass


class _DiesAfter(Store):
    """Of deletions, one by one."""

    def __init__(self, url: str, deletions: int) -> None:
        super().__init__(url)
        self.left = deletions
        self._turn = threading.Lock()

    def delete(self, path: str) -> None:
        with self._turn:
            self.left -= 1
            if self.left < 0:
                raise _Dies
            super().delete(path)


@pytest.mark.parametrize("deletions", [0, 1, 2, 3, 5, 7, 9, 11, 13, 15, 17, 20, 24])
def test_killed_anywhere_nothing_looks_complete_that_is_not_and_the_next_one_ends_it(
    made: MadeRecipe, deletions: int
) -> None:
    runs = [run(made, number) for number in range(4)]
    made.age(2)
    dying = _DiesAfter(made.store.url, deletions)
    with suppress(_Dies):
        gc(made, "acquire.shard_size=13", store=dying, keep=1)
    check_nothing_looks_complete_that_is_not(made)
    assert is_whole(made, runs[3])
    made.age(2)
    gc(made, "acquire.shard_size=13", keep=1)
    check_nothing_looks_complete_that_is_not(made)
    assert is_whole(made, runs[3])
    kept = {unit.key for unit in runs[3]["acquire"].units}
    assert {path.split("/")[2] for path in made.files() if path.startswith("acquire/units/")} == kept
    assert made.store.listdir("acquire/revisions") == [runs[3]["acquire"].revision]
    again = run(made, 0)
    assert is_whole(made, again)


def test_what_was_deleted_half_and_published_again_is_a_revision_like_others(made: MadeRecipe) -> None:
    runs = [run(made, number) for number in range(2)]
    made.age(2)
    with suppress(_Dies):
        gc(made, "acquire.shard_size=11", store=_DiesAfter(made.store.url, 8), keep=1)
    assert any(path.endswith("deleted.json") for path in made.files())
    again = run(made, 0)
    assert {name: one.revision for name, one in again.items()} == {name: one.revision for name, one in runs[0].items()}
    made.age(2)
    gc(made, "acquire.shard_size=10", keep=2)
    assert is_whole(made, again)
    assert is_whole(made, runs[1])


def test_a_run_that_begins_meanwhile_waits_and_makes_what_is_gone(made: MadeRecipe) -> None:
    old = run(made, 0)
    for number in range(3, 6):
        run(made, number)
    made.age(2)
    made.store.delete(f"acquire/keys/{old['acquire'].key}.json")  # so that it has to be built, from the units there are
    results: list[dict[str, Artifact]] = []
    other = MadeRecipe(Path(made.file).parent)
    thread = threading.Thread(target=lambda: results.append(run(other, 0)))
    with collecting(made.store):
        told = found(made, "acquire.shard_size=15", keep=1)
        thread.start()
        time.sleep(0.3)
        left = collect(made.store, told)
    thread.join(timeout=60)
    assert left in ([], ["acquire"]), "either it had begun, or it waited"
    (result,) = results
    assert is_whole(made, result)
    check_nothing_looks_complete_that_is_not(made)


# -- an object store ---------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(tmp_path: Path, s3_url: str) -> MadeRecipe:
    return MadeRecipe(tmp_path, s3_url)


def test_an_object_store_is_collected_by_its_own_times(remote: MadeRecipe) -> None:
    runs = [run(remote, number) for number in range(2)]
    assert all(one.is_empty for one in found(remote, "acquire.shard_size=11", keep=1))
    later_s = time.time() + DAY_S + 60
    gc(remote, "acquire.shard_size=11", keep=1, now_s=later_s)
    assert is_whole(remote, runs[1])
    for artifact in runs[0].values():
        assert is_gone(remote, artifact)
    nodes = build_graph(remote.recipe("acquire.shard_size=11"))
    checks = list(verify(nodes, remote.store, "small", lambda *_: None))
    assert [check.state for check in checks] == ["sound"] * 3
