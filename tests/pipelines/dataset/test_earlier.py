"""Rows that earlier units hold: found wherever they are, never a wrong one, and none where anything is damaged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from asked import asked
from hypothesis import given
from hypothesis import strategies as st

from infra.storage import Store
from pipelines.again import ask_again
from pipelines.artifacts import Artifact, Counts, Unit
from pipelines.building import Build, building
from pipelines.dataset.earlier import (
    FEW,
    INPUTS,
    UNREADABLE,
    KnownUnits,
    copied_rows,
    inputs_bytes,
    inputs_of,
    recorded_file,
)
from pipelines.publishing import publish_unit

STAGE = "score"
OURS, OTHERS = (hashlib.sha256(name).hexdigest()[:32] for name in (b"ours", b"others"))
IMAGES = st.lists(st.sampled_from(["", *"abcdefg"]), max_size=6)


def make(store: Store, key: str, images: Sequence[str], made_with: str = OURS) -> Unit:
    """A unit whose rows were made from these images; "" is one of which nothing is known."""
    files: dict[str, Path | bytes] = {INPUTS: inputs_bytes(inputs_of(images))}
    counts = Counts(len(images), len(images))
    return publish_unit(store, STAGE, key, files, counts, {"made_with": made_with, "content": key})


def publish(store: Store, *units: Unit) -> Artifact:
    with building(store, STAGE, asked({"units": [unit.key for unit in units]}), {}, {}, 1) as build:
        return build.publish(units)


@pytest.fixture
def build(store: Store) -> Iterator[Build]:
    with building(store, STAGE, asked(), {}, {}, 1) as build:
        yield build


@given(wanted=st.lists(IMAGES, max_size=4), there=st.lists(IMAGES, max_size=4))
def test_every_row_that_is_known_is_found_once_and_is_the_right_one(
    tmp_path_factory: pytest.TempPathFactory, wanted: list[list[str]], there: list[list[str]]
) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    units = [make(store, f"{number:032x}", images) for number, images in enumerate(there)]
    images_of_unit = dict(zip((unit.key for unit in units), there, strict=True))
    known = {image for images in there for image in images} - {""}
    found = copied_rows(store, [inputs_of(images) for images in wanted], units)
    assert len(found) == len(wanted)
    for images, copied in zip(wanted, found, strict=True):
        here = [row for part in copied for row in part.here.tolist()]
        assert sorted(here) == [row for row, image in enumerate(images) if image in known]
        for part in copied:
            own = images_of_unit[part.unit.key]
            assert [images[row] for row in part.here] == [own[row] for row in part.there]


def test_a_unit_is_not_read_for_a_few_rows_of_many(store: Store) -> None:
    """Rows that are dealt out anew would have every shard read for every other."""
    unit = make(store, "a" * 32, [str(number) for number in range(3 * FEW)])
    found = copied_rows(store, [inputs_of(["0", "1"]), inputs_of(["0", "1", "2"])], [unit])
    assert [[part.here.tolist() for part in copied] for copied in found] == [[], [[0, 1, 2]]]


def test_inputs_differ_where_any_value_does_and_nowhere_else() -> None:
    images, captions = ["a", "ab", "a", None, "", "a"], ["bc", "c", "bc", "x", "x", None]
    inputs = inputs_of(images, captions)
    assert inputs.dtype == "S16"
    assert inputs[0] == inputs[2]
    assert len({inputs[0], inputs[1], inputs[5], inputs_of(["a"])[0]}) == 4
    assert inputs[3] == inputs[4] == b""
    assert inputs_of([], []).shape == (0,)


def test_bytes_that_end_in_zeros_are_no_others(store: Store) -> None:
    """The type that holds them leaves out zeros at the end."""
    hashes = np.array([b"x" * 15 + b"\0", b"x" * 15, b"x" * 14 + b"\0y"], "S16")
    files: dict[str, Path | bytes] = {INPUTS: inputs_bytes(hashes)}
    unit = publish_unit(store, STAGE, "k" * 32, files, Counts(3, 3), {"made_with": OURS})
    (copied,) = copied_rows(store, [hashes[2:]], [unit])
    assert [(part.there.tolist(), part.here.tolist()) for part in copied] == [([2], [0])]


def known_units(build: Build) -> KnownUnits:
    return KnownUnits(build.store, build.stage, [OURS], build.again)


def test_units_are_known_from_any_revision_and_from_none(store: Store, build: Build) -> None:
    publish(store, make(store, "a" * 32, "ab"), make(store, "b" * 32, "c"), make(store, "c" * 32, "d", OTHERS))
    publish(store, make(store, "d" * 32, "abc"))
    make(store, "e" * 32, "x")
    make(store, "f" * 32, "x", OTHERS)
    known = known_units(build)
    assert [unit.key[0] for unit in known.earlier(OURS, {"b" * 32})] == ["d", "a", "e"]
    assert set(known.listed) == {"a" * 32, "b" * 32, "d" * 32}
    for key in ("a", "e"):
        found = known.find(key * 32)
        assert found is not None
        assert found.counts == Counts(found.counts.total, found.counts.total)
    assert known.find("9" * 32) is None


def test_what_is_gone_or_damaged_is_not_there(store: Store, build: Build) -> None:
    gone, changed, sound = (make(store, key * 32, images) for key, images in (("a", "ab"), ("b", "cd"), ("c", "e")))
    listed = publish(store, gone, changed, sound)
    store.delete(f"{STAGE}/units/{gone.key}")
    data = bytearray(store.read_bytes(changed.path(INPUTS)))
    data[-1] ^= 1
    store.publish_bytes(changed.path(INPUTS), bytes(data))
    known = known_units(build)
    assert known.find(gone.key) is None
    earlier = known.earlier(OURS, ())
    assert [unit.key for unit in earlier] == [changed.key, sound.key]
    (copied,) = copied_rows(store, [inputs_of("acde")], [gone, *earlier])
    assert [(part.unit.key, part.here.tolist()) for part in copied] == [(sound.key, [3])]
    with pytest.raises(UNREADABLE):
        recorded_file(store, changed, INPUTS)

    table = f"{listed.path}/units.parquet"
    data = bytearray(store.read_bytes(table))
    data[len(data) // 2] ^= 1
    store.publish_bytes(table, bytes(data))
    again = known_units(build)
    assert again.listed == {}
    assert [unit.key for unit in again.earlier(OURS, ())] == [changed.key, sound.key]


def test_where_all_is_to_be_made_from_nothing_there_is_nothing_earlier(store: Store) -> None:
    with building(store, STAGE, asked(), {}, {}, 1) as build:
        build.publish([make(store, "a" * 32, "ab")])
        key = build.key
    ask_again(store, STAGE, key, "force")
    with building(store, STAGE, asked(), {}, {}, 1) as build:
        assert known_units(build).earlier(OURS, ()) == []
