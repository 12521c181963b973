from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from asked import asked
from hypothesis import given
from hypothesis import strategies as st

from infra.storage import Store
from pipelines.again import ask_again
from pipelines.artifacts import Artifact, ArtifactError, Counts, CountsMismatch, digest, fetch_folder, find, load
from pipelines.building import Build, building
from pipelines.publishing import publish_unit


def make(
    store: Store, spec: dict[str, object], contents: list[bytes], inputs: dict[str, Artifact] | None = None
) -> Artifact:
    with building(store, "demo", asked(spec), inputs or {}, {"ranks": 1}, 1) as build:
        return build.publish([_unit(build, content) for content in contents])


def _unit(build: Build, content: bytes) -> object:
    key = build.unit_key({"content": content.decode()})
    return build.find_unit(key) or publish_unit(build.store, "demo", key, {"data.bin": content}, Counts(1, 1))


def test_an_artifact_is_found_by_its_key_alone(store: Store) -> None:
    made = make(store, {"a": 1}, [b"x", b"y"])
    found = find(store, "demo", made.key)
    assert found == made
    assert found is not None
    assert found.counts == Counts(2, 2)
    assert store.read_bytes(found.units[1].only(".bin")) == b"y"
    assert find(store, "demo", "0" * 32) is None


def test_equal_content_is_an_equal_revision_whatever_was_asked_for(store: Store) -> None:
    first, second = make(store, {"a": 1}, [b"x"]), make(store, {"a": 2}, [b"x"])
    assert first.key != second.key
    assert first.revision == second.revision


def test_the_manifest_says_where_it_comes_from(store: Store) -> None:
    source = make(store, {"a": 1}, [b"x"])
    manifest = make(store, {"a": 2}, [b"z"], {"source": source}).manifest
    assert manifest["inputs"] == {"source": source.revision}
    assert manifest["spec"] == {"a": 2}
    assert manifest["execution"] == {"ranks": 1}
    assert manifest["versions"]["python"].startswith("3.")
    files = pq.read_table(
        io.BytesIO(store.read_bytes(f"demo/revisions/{manifest['revision']}/files.parquet"))
    ).to_pylist()
    assert [(row["size_bytes"], len(row["sha256"])) for row in files] == [(1, 64)]
    assert store.read_bytes(files[0]["path"]) == b"z"


def test_a_rebuild_makes_new_units_and_leaves_the_old_ones(store: Store) -> None:
    first = make(store, {"a": 1}, [b"x"])
    (old,) = first.units
    ask_again(store, "demo", first.key, "force")
    assert find(store, "demo", first.key) is None
    second = make(store, {"a": 1}, [b"x"])
    assert second.units[0].key != old.key
    assert second.revision == first.revision
    assert find(store, "demo", first.key) == second
    assert store.read_bytes(old.only(".bin")) == b"x"


def test_counts_that_do_not_add_up_publish_nothing(store: Store) -> None:
    with pytest.raises(CountsMismatch, match=r"3 in, but 1 kept \+ 1 dropped \+ 0 failed"):
        publish_unit(store, "demo", "k", {"data.bin": b"x"}, Counts(3, 1, {"small": 1}))
    assert store.listdir("demo/units") == []
    with (
        building(store, "demo", asked(), {}, {}, 1) as build,
        pytest.raises(CountsMismatch),
    ):
        build.publish([], counts=Counts(1, 0))
    assert find(store, "demo", build.key) is None


def test_a_unit_without_its_record_does_not_exist(store: Store) -> None:
    with building(store, "demo", asked(), {}, {}, 1) as build:
        store.publish_bytes("demo/units/torn/data.bin", b"x")
        assert build.find_unit("torn") is None


def test_a_damaged_revision_says_how_to_make_it_again(store: Store) -> None:
    made = make(store, {}, [b"x"])
    store.delete(f"{made.path}/units.parquet")
    with pytest.raises(ArtifactError, match=r"units.parquet is missing; `ldm store verify RECIPE --repair`"):
        load(store, "demo", made.revision).units  # noqa: B018
    store.delete(f"{made.path}/manifest.json")
    with pytest.raises(ArtifactError, match=r"manifest.json is missing; `ldm store verify RECIPE --repair`"):
        load(store, "demo", made.revision)


def test_folders_of_a_unit_come_near_whole(store: Store) -> None:
    unit = publish_unit(store, "demo", "k", {"unet/a.json": b"1", "unet/b.bin": b"2", "top.json": b"3"}, Counts(1, 1))
    folder = fetch_folder(store, unit, "unet")
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.bin"]
    with pytest.raises(ArtifactError, match="no folder 'vae'"):
        fetch_folder(store, unit, "vae")


reasons = st.dictionaries(st.sampled_from(["small", "broken", "dup"]), st.integers(0, 5))


@given(st.lists(st.tuples(st.integers(0, 9), reasons, reasons), min_size=1))
def test_sums_of_consistent_counts_are_consistent(rows: list[tuple[int, dict[str, int], dict[str, int]]]) -> None:
    total = Counts(0, 0)
    for kept, dropped, failed in rows:
        total += Counts(kept + sum(dropped.values()) + sum(failed.values()), kept, dropped, failed)
    total.check("sum")
    assert Counts.from_json(total.to_json()) == total


def test_digest_ignores_the_order_of_keys_and_nothing_else() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})
    assert digest({"a": 1}) != digest({"a": 1.5})


def test_two_processes_never_make_the_same_artifact_at_once(tmp_path: Path) -> None:
    from infra.locks import Locked

    store = Store(tmp_path)
    with (
        building(store, "demo", asked(), {}, {}, 1),
        pytest.raises(Locked),
        building(store, "demo", asked(), {}, {}, 1),
    ):
        pass
