"""`ldm store verify` finds whatever is not what was written, and a repair costs no more than it has to; `ldm store gc`
deletes what nothing needs, and nothing else."""

from __future__ import annotations

import errno
import itertools
import json
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from made import NODES, ROWS, MadeRecipe
from typer.testing import CliRunner

from infra.locks import Locked, lock
from infra.storage import StorageError
from pipelines.again import ask_again, asked_again
from pipelines.artifacts import Counts, Unit, find
from pipelines.commands.store import store_app
from pipelines.errors import LatentworksError
from pipelines.publishing import publish_unit


@pytest.fixture(autouse=True)
def _no_plug_is_pulled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk is most of what publishing small files takes."""
    monkeypatch.setattr("infra.storage._fsync", lambda path: None)


@pytest.fixture
def made(tmp_path: Path) -> MadeRecipe:
    recipe = MadeRecipe(tmp_path)
    recipe.make()
    return recipe


def ldm_store(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(store_app, list(arguments), env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def verified(made: MadeRecipe, *more: str) -> dict[str, Any]:
    code, out = ldm_store("verify", made.file, "--json", *more)
    answer: dict[str, Any] = json.loads(out)
    assert code == (0 if answer["sound"] or answer["repaired"] else 1)
    return answer


def damaged(made: MadeRecipe) -> dict[str, str]:
    """What is wrong, by path."""
    return {entry["path"]: entry["what"] for node in verified(made)["nodes"] for entry in node["damaged"]}


def units_of(made: MadeRecipe, node: str) -> tuple[Unit, ...]:
    (key,) = (name.removesuffix(".json") for name in made.store.listdir(f"{node}/keys") if name.endswith(".json"))
    artifact = find(made.store, node, key)
    assert artifact is not None
    return artifact.units


def published_files(made: MadeRecipe) -> list[str]:
    return sorted(name for name in made.files() if not name.startswith("recipes/"))


# -- verify ------------------------------------------------------------------------------------------------------------


def test_a_sound_store_is_told_node_by_node(made: MadeRecipe) -> None:
    code, out = ldm_store("verify", made.file)
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == list(NODES)
    assert all(line.split()[1] == "sound" for line in lines)
    assert "3 units, 6 files" in lines[0]
    assert damaged(made) == {}


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("how", ["deleted", "emptied", "cut", "flipped"])
def test_each_damaged_file_is_found_and_no_other(made: MadeRecipe, node: str, how: str) -> None:
    for name in [name for name in published_files(made) if name.startswith(f"{node}/")]:
        whole = made.store.read_bytes(name)
        if how == "deleted":
            made.store.delete(name)
        else:
            made.path(name).write_bytes({"emptied": b"", "cut": whole[: len(whole) // 2], "flipped": whole}[how])
            if how == "flipped":
                made.flip(name)
        assert name in damaged(made), name
        made.store.publish_bytes(name, whole)
        assert damaged(made) == {}, name


def put(how: str, file: Path) -> None:
    """In a file's place, something that is none."""
    file.unlink()
    if how.startswith("folder"):
        file.mkdir()
        if how == "folder with a file":
            (file / "file").write_bytes(b"1")
    else:
        file.symlink_to({"link to itself": file.name, "link to nowhere": "nowhere", "link to a folder": "/"}[how])


NO_FILE = ("folder", "folder with a file", "link to itself", "link to nowhere", "link to a folder")


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("how", NO_FILE)
def test_what_is_no_file_is_found_and_makes_way(made: MadeRecipe, node: str, how: str) -> None:
    revisions = {name: artifact.revision for name, artifact in made.make().items()}
    for name in [name for name in published_files(made) if name.startswith(f"{node}/")]:
        put(how, made.path(name))
        assert name in damaged(made), name
        verified(made, "--repair")
        again = {name: artifact.revision for name, artifact in made.make().items()}
        assert again == revisions, name
        of_a_unit = "/units/" in name and not name.endswith("record.json")
        assert len(made.units_made) == of_a_unit, (name, made.units_made)
        assert made.path(name).is_file(), name
        assert damaged(made) == {}, name


def test_another_files_content_is_damage(made: MadeRecipe) -> None:
    """It is sealed, and yet not what was written there."""
    ask_again(made.store, "acquire", made.make()["acquire"].key, "force")
    artifacts = made.make()
    renewed = [f"acquire/renewed/{name}" for name in made.store.listdir("acquire/renewed")]
    answers = [f"{node}/keys/{artifact.key}.json" for node, artifact in artifacts.items()]
    manifests = [f"{artifact.path}/manifest.json" for artifact in artifacts.values()]
    records = [f"{unit.stage}/units/{unit.key}/record.json" for each in artifacts.values() for unit in each.units]
    sealed_files = [*renewed[:1], *answers[:2], *manifests[:2], *records[:2]]
    others = [*renewed[:2], answers[0], manifests[0], *records[:2]]
    for name, other in itertools.product(sealed_files, others):
        own_manifest = name in answers and other == manifests[answers.index(name)]
        if name == other or own_manifest:  # which says all that the answer says
            continue
        whole = made.store.read_bytes(name)
        made.store.publish_bytes(name, made.store.read_bytes(other))
        assert name in damaged(made), (name, other)
        assert verified(made, "--repair")["repaired"]
        made.make()
        assert made.units_made == [], (name, other)
        assert damaged(made) == {}, (name, other)
        made.store.publish_bytes(name, whole)


def test_what_nobody_published_is_named_and_left_where_it_is(made: MadeRecipe) -> None:
    (unit,) = units_of(made, "train.autoencoder")
    stray = f"train.autoencoder/units/{unit.key}/inner/of_mine.txt"
    made.path(stray).write_text("mine")
    code, out = ldm_store("verify", made.file, "--repair")
    assert code == 0
    assert f"{made.store.location(stray)}: not published, and read by nobody" in out
    answer = verified(made)
    assert answer["sound"]
    assert [node["strays"] for node in answer["nodes"]] == [[], [], [stray]]
    assert made.store.exists(stray)


def test_what_is_wrong_is_said(made: MadeRecipe) -> None:
    first, second, third = units_of(made, "acquire")
    made.store.delete(first.path("note.txt"))
    made.path(second.path("inner/data.bin")).write_bytes(b"12345")
    made.flip(third.path("inner/data.bin"))
    code, out = ldm_store("verify", made.file)
    assert code == 1
    assert f"{made.store.location(first.path('note.txt'))}: missing" in out
    assert f"{made.store.location(second.path('inner/data.bin'))}: 5 of 1,000 bytes" in out
    assert f"{made.store.location(third.path('inner/data.bin'))}: other sha256" in out
    assert f"3 shards made again: up to {3 * ROWS} URLs asked again" in out
    assert f"ldm store verify {made.file} --repair" in out
    assert made.store.exists(f"acquire/units/{first.key}/record.json"), "without --repair nothing is changed"


@pytest.mark.parametrize("table", ["units.parquet", "files.parquet", "manifest.json"])
def test_any_bit_of_what_lists_units_counts(made: MadeRecipe, table: str) -> None:
    artifact_path = next(name for name in published_files(made) if name.endswith(f"acquire/{table}") or table in name)
    whole = made.store.read_bytes(artifact_path)
    step = max(1, 8 * len(whole) // 25) + 1
    for place in range(0, 8 * len(whole), step):
        made.flip(artifact_path, place)
        assert artifact_path in damaged(made)
        made.store.publish_bytes(artifact_path, whole)


def test_what_is_behind_a_node_that_is_to_do_waits(made: MadeRecipe) -> None:
    nodes = verified(made, "--set", "acquire.shard_size=7")["nodes"]
    assert [node["state"] for node in nodes] == ["to do", "waiting", "waiting"]


def test_an_empty_store_is_no_sound_one(made: MadeRecipe, tmp_path: Path) -> None:
    with pytest.raises(LatentworksError, match="nothing of small is published"):
        ldm_store("verify", made.file, "--set", f"store={tmp_path / 'elsewhere'}")


# -- repair ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("how", ["deleted", "cut", "flipped"])
def test_any_single_damage_is_repaired_at_the_least_cost(made: MadeRecipe, node: str, how: str) -> None:
    """Only a unit whose own files are gone is made again, and only that one."""
    revisions = {name: artifact.revision for name, artifact in made.make().items()}
    for name in [name for name in published_files(made) if name.startswith(f"{node}/")]:
        whole = made.store.read_bytes(name)
        if how == "deleted":
            made.store.delete(name)
        elif how == "cut":
            made.path(name).write_bytes(whole[: len(whole) // 2])
        else:
            made.flip(name)
        answer = verified(made, "--repair")
        assert answer["repaired"], name
        again = {name: artifact.revision for name, artifact in made.make().items()}
        assert again == revisions, name
        of_a_unit = "/units/" in name and not name.endswith("record.json")
        assert len(made.units_made) == of_a_unit, (name, made.units_made)
        assert all(entry.startswith(f"{node} ") for entry in made.units_made)
        assert damaged(made) == {}, name


def test_a_repaired_node_is_to_do_until_it_has_run(made: MadeRecipe) -> None:
    unit = units_of(made, "acquire")[1]
    made.store.delete(unit.path("note.txt"))
    code, out = ldm_store("verify", made.file, "--repair")
    assert code == 0
    assert f"now run:  ldm run {made.file}" in out
    assert not made.store.exists(f"acquire/units/{unit.key}/record.json")
    assert made.store.exists(unit.path("inner/data.bin")), "rows that are sound can be taken over"
    states = {node["node"]: node["state"] for node in verified(made)["nodes"]}
    assert states == {"acquire": "to do", "select": "waiting", "train.autoencoder": "waiting"}
    made.make()
    assert made.units_made == ["acquire b"]
    assert damaged(made) == {}


def test_a_unit_that_many_have_is_to_do_for_all_of_them(made: MadeRecipe) -> None:
    """Shared with another question's revision, as increments share it."""
    before = made.make()["acquire"]
    after = made.make("acquire.shard_size=7", images=("a", "b", "c", "d"))["acquire"]
    other = made.make("acquire.shard_size=8", images=("x", "y"))["acquire"]
    assert before.units == after.units[:3]
    made.store.delete(before.units[0].path("note.txt"))
    assert verified(made, "--repair")["repaired"]
    for key in (before.key, after.key):
        again = asked_again(made.store, "acquire", key)
        assert again is not None
        assert again.why == "repair"
    assert asked_again(made.store, "acquire", other.key) is None


def test_a_unit_that_was_made_again_with_another_outcome_is_listed_anew(made: MadeRecipe) -> None:
    """The web has changed between the damage and the repair of another recipe's: the old list is of what is no more."""
    before = made.make()["acquire"]
    unit = before.units[0]
    made.store.delete(f"acquire/units/{unit.key}")
    publish_unit(made.store, "acquire", unit.key, {"note.txt": b"another"}, Counts(ROWS, ROWS), {"is": "a"})
    record = f"acquire/units/{unit.key}/record.json"
    assert damaged(made) == {record: "made again since, and not the one that is listed"}
    assert verified(made, "--repair")["repaired"]
    after = made.make()["acquire"]
    assert "acquire a" not in made.units_made
    assert after.revision != before.revision
    assert damaged(made) == {}


def test_what_leads_to_a_unit_made_anew_is_mended(made: MadeRecipe) -> None:
    acquired = made.make()["acquire"]
    ask_again(made.store, "acquire", acquired.key, "force")
    forced = made.make()["acquire"]
    (alias, *_) = made.store.listdir("acquire/renewed")
    for spoil in (made.flip, made.store.delete):
        spoil(f"acquire/renewed/{alias}")
        assert list(damaged(made)) == [f"acquire/renewed/{alias}"]
        assert verified(made, "--repair")["repaired"]
        made.make("acquire.shard_size=7")
        assert made.units_made == [] or all(not entry.startswith("acquire") for entry in made.units_made)
        made.store.delete(f"{forced.path}/units.parquet")
        assert verified(made, "--repair")["repaired"]
        assert damaged(made) == {}


def test_a_unit_and_its_record_and_the_table_may_be_damaged_at_once(made: MadeRecipe) -> None:
    acquired = made.make()["acquire"]
    unit = acquired.units[0]
    made.flip(unit.path("inner/data.bin"))
    made.flip(f"acquire/units/{unit.key}/record.json")
    assert verified(made, "--repair")["repaired"]
    made.make()
    assert made.units_made == ["acquire a"]

    made.flip(unit.path("inner/data.bin"))
    made.flip(f"acquire/units/{unit.key}/record.json")
    made.flip(f"{acquired.path}/units.parquet")
    assert verified(made, "--repair")["repaired"]
    made.make()
    assert made.units_made == ["acquire a"]

    for table in ("units.parquet", "files.parquet", "manifest.json"):
        made.flip(f"{acquired.path}/{table}")
    assert verified(made, "--repair")["repaired"]
    made.make()
    assert made.units_made == []
    assert damaged(made) == {}


def test_a_training_says_what_it_costs(made: MadeRecipe) -> None:
    (unit,) = units_of(made, "train.autoencoder")
    made.flip(unit.path("inner/data.bin"))
    _, out = ldm_store("verify", made.file)
    assert "train.autoencoder: trained again from nothing (all of it took" in out
    folder = f"train.autoencoder/unfinished/{unit.key}/checkpoints/000000008"
    manifest = {"format": 1, "step": 8, "info": {}, "files": []}
    made.store.publish_bytes(f"{folder}/manifest.json", json.dumps(manifest).encode())
    _, out = ldm_store("verify", made.file)
    assert "trained again from step 8" in out


def test_what_is_being_made_is_not_repaired(made: MadeRecipe) -> None:
    acquired = made.make()["acquire"]
    made.store.delete(acquired.units[0].path("note.txt"))
    with lock(made.store, f"acquire/{acquired.key}"), pytest.raises(Locked, match="another run is writing"):
        ldm_store("verify", made.file, "--repair")
    assert find(made.store, "acquire", acquired.key) is not None
    assert made.store.exists(f"acquire/units/{acquired.units[0].key}/record.json")


class _Network(MemoryFileSystem):
    """An object store at the end of a network that carries so many more files."""

    protocol = "network"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    left = 10**9

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return "/" + str(path).removeprefix("network://").strip("/")

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        self._carry()
        return super()._open(path, mode, **more)

    def cat_file(self, path: str, **more: Any) -> Any:
        self._carry()
        return super().cat_file(path, **more)

    def _carry(self) -> None:
        type(self).left -= 1
        if self.left < 0:
            raise ConnectionResetError(errno.ECONNRESET, "connection reset by peer")


@pytest.mark.parametrize("files", range(0, 30, 3))
def test_a_store_that_stops_answering_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int
) -> None:
    fsspec.register_implementation("network", _Network, clobber=True)
    monkeypatch.setattr(_Network, "store", {})
    made = MadeRecipe(tmp_path, "network://bucket")
    made.flip(made.make()["acquire"].units[0].path("note.txt"))
    before = {name: file.getvalue() for name, file in _Network.store.items()}
    monkeypatch.setattr(_Network, "left", files)
    with pytest.raises(StorageError, match="connection reset by peer"):
        ldm_store("verify", made.file, "--repair")
    assert {name: file.getvalue() for name, file in _Network.store.items()} == before
    monkeypatch.setattr(_Network, "left", 10**9)
    assert len(damaged(made)) == 1


def test_verifying_works_in_an_object_store_too(tmp_path: Path, s3_url: str) -> None:
    made = MadeRecipe(tmp_path, s3_url)
    acquired = made.make()["acquire"]
    assert damaged(made) == {}
    first, second, third = acquired.units
    made.store.delete(first.path("inner/data.bin"))
    made.store.publish_bytes(second.path("inner/data.bin"), b"12345")
    made.flip(third.path("note.txt"))
    assert set(damaged(made).values()) == {"missing", "5 of 1,000 bytes"} | {
        what for what in damaged(made).values() if what.startswith("other sha256")
    }
    assert len(damaged(made)) == 3
    assert verified(made, "--repair")["repaired"]
    made.make()
    assert made.units_made == ["acquire a", "acquire b", "acquire c"]
    assert damaged(made) == {}


# -- gc ----------------------------------------------------------------------------------------------------------------


def test_gc_says_what_goes_and_how_much_it_is_before_it_goes(made: MadeRecipe) -> None:
    """What a run under other settings left is in nobody's way; the recipe's own is what it was."""
    made.make("acquire.shard_size=9", images=("old", "older"))
    made.make()
    before = made.files()
    assert ldm_store("gc", made.file, "--dry-run") == (0, "0 B could be deleted\n"), "younger than a day"
    made.age(2)
    code, told = ldm_store("gc", made.file, "--dry-run")
    assert (code, made.files()) == (0, before)
    lines = [line.split() for line in told.splitlines()]
    assert [line[0] for line in lines[:-1]] == list(NODES)
    assert "1 revision, 2 units" in told.splitlines()[0]
    assert told.splitlines()[-1].endswith("could be deleted")
    code, out = ldm_store("gc", made.file)
    assert code == 0
    assert out.splitlines()[:-1] == told.splitlines()[:-1]
    assert out.splitlines()[-1] == told.splitlines()[-1].replace("could be deleted", "deleted")
    assert made.files() < before
    assert damaged(made) == {}
    assert ldm_store("gc", made.file) == (0, "nothing to delete\n")


def test_gc_leaves_interrupted_work_and_says_so(made: MadeRecipe) -> None:
    publish_unit(made.store, "acquire", "a" * 32, {"note.txt": b"half a download"}, Counts(1, 1))
    made.age(2)
    _, out = ldm_store("gc", made.file)
    assert "of interrupted work (--unfinished deletes it)" in out
    assert made.store.exists(f"acquire/units/{'a' * 32}/record.json")
    ldm_store("gc", made.file, "--unfinished")
    assert made.store.listdir(f"acquire/units/{'a' * 32}") == []
    assert damaged(made) == {}


def test_two_gcs_at_once_are_one_too_many(made: MadeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.workflow.collection.WAIT_S", 0.0)
    with lock(made.store, "gc"), pytest.raises(Locked):
        ldm_store("gc", made.file)
    assert ldm_store("gc", made.file, "--dry-run")[0] == 0
