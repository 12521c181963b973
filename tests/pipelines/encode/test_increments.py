"""`encode` when something changes: rows that were encoded from the same image and caption are copied, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from infra.storage import Store
from pipelines.again import ask_again
from pipelines.artifacts import Artifact, Unit
from pipelines.dataset.cache import CacheFile, open_cache
from pipelines.dataset.facts import CacheFacts, is_null
from pipelines.dataset.figures import figures_of
from pipelines.encode import stage
from pipelines.recipe import Execution, Predicate, Split, TextToImageModel

pytestmark = pytest.mark.usefixtures("in_process")

LESS = Predicate(name="one_less", column="key", op="!=", value="000000005")


class Encoding:
    """Encodes what is given to it, with one autoencoder."""

    def __init__(self, published: Any, model: TextToImageModel, report: Any) -> None:
        self.published = published
        self.store: Store = published.store
        self.report = report
        self.model = model
        self.autoencoder = published.autoencoder()
        self.extractor: str | None = None

    def __call__(self, acquired: Artifact, **rules: Any) -> Artifact:
        inputs = {
            "acquire": acquired,
            "select": self.published.select(acquired, **rules),
            "train.autoencoder": self.autoencoder,
        }
        execution = Execution(device="cpu", extractor=self.extractor)
        return stage.encode("base", self.model, inputs, self.store, self.report, execution)

    def file(self, unit: Unit) -> CacheFile:
        return open_cache(self.store.fetch(unit.path("cache.arrow")))

    def rows(self, encoded: Artifact) -> dict[str, tuple[bytes, bytes]]:
        """Bytes of each sample's moments and text, by uid."""
        found = {}
        for unit in units(encoded):
            file = self.file(unit)
            moments, text = ([row for view in views for row in view] for views in (file.moments(), file.text()))
            for uid, *values in zip(file.strings("uid"), moments, text, strict=True):
                found[uid] = (values[0].tobytes(), values[1].tobytes())
        return found


@pytest.fixture
def encode(published: Any, model: TextToImageModel, report: Any) -> Encoding:
    return Encoding(published, model, report)


def units(encoded: Artifact) -> list[Unit]:
    return [unit for unit in encoded.units if not is_null(unit)]


def work(encoded: Artifact) -> list[tuple[int, int]]:
    """Rows that were computed, and copied, of each shard."""
    return [(each.computed, each.copied) for each in map(CacheFacts.of, units(encoded))]


def flip(store: Store, path: str) -> None:
    data = bytearray(store.read_bytes(path))
    data[len(data) // 2] ^= 1
    store.publish_bytes(path, bytes(data))


def test_one_sample_more_is_encoded_alone(encode: Encoding) -> None:
    acquired = encode.published.acquire((12, 8))
    first = encode(acquired, where=(LESS,))
    second = encode(acquired)
    assert work(first) == [(8, 0), (6, 0)]
    assert work(second) == [(1, 8), (6, 0)]
    assert second.units[1] == first.units[1]
    old, new = encode.rows(first), encode.rows(second)
    assert {uid: new[uid] for uid in old} == old
    assert set(new) - set(old) == {f"{5:032x}"}
    last = [(done, total) for done, total, unit, _ in encode.report.steps if unit == "images"][-1]
    assert last == (15, 15)


def test_a_unit_with_copied_rows_is_as_one_computed_anew(
    encode: Encoding, published: Any, model: TextToImageModel, report: Any, tmp_path: Any
) -> None:
    encode(encode.published.acquire((12,)), where=(LESS,))
    second = encode(encode.published.acquire((16,)))
    assert work(second) == [(4, 8)]
    elsewhere = Encoding(type(published)(Store(tmp_path / "other"), tmp_path / "networks2"), model, report)
    anew = elsewhere(elsewhere.published.acquire((16,)))
    assert anew.revision == second.revision
    one, other = encode.file(second.units[0]), elsewhere.file(anew.units[0])
    plain = [name for name in one.table.column_names if name not in ("moments", "text")]
    assert one.table.select(plain).equals(other.table.select(plain))
    for name in ("moments", "text"):
        values = [np.concatenate(getattr(file, name)()) for file in (one, other)]
        np.testing.assert_allclose(*values, atol=2e-3)


def test_another_split_moves_rows_without_encoding_them(encode: Encoding) -> None:
    encode.extractor = "efficientnet_lite0"
    acquired = encode.published.acquire((12, 12))
    first = encode(acquired)
    assert [figure.subject for figure in figures_of(first)] == ["reconstructions"]
    for entry in encode.autoencoder.units[0].files:  # nothing below needs a network, or an image
        path = encode.autoencoder.units[0].path(entry.name)
        if path.endswith(".safetensors"):
            encode.store.publish_bytes(path, bytes(entry.size_bytes))
    for unit in acquired.units:
        path = unit.only(".tar")
        encode.store.publish_bytes(path, bytes(len(encode.store.read_bytes(path))))
    second = encode(acquired, split=Split(held_out=0.6))
    assert second.revision != first.revision
    assert work(second) == [(0, 9), (0, 9)]
    assert encode.rows(second) == encode.rows(first)
    for unit in units(second):
        facts, splits = CacheFacts.of(unit), encode.file(unit).strings("split")
        assert (facts.train, facts.held_out) == (splits.count("train"), splits.count("held_out"))
    assert sum(unit.info["held_out"] for unit in units(second)) > sum(unit.info["held_out"] for unit in units(first))
    assert figures_of(second) == []


def test_another_caption_or_image_is_encoded(encode: Encoding) -> None:
    first = encode(encode.published.acquire((12,)))
    second = encode(encode.published.acquire((12,), captions={2: "something else"}))
    assert work(second) == [(1, 8)]
    old, new = encode.rows(first), encode.rows(second)
    (changed,) = (uid for uid in old if old[uid] != new[uid])
    assert changed == f"{2:032x}"
    assert old[changed][0] == new[changed][0]
    assert old[changed][1] != new[changed][1]


def test_other_networks_copy_nothing(encode: Encoding) -> None:
    acquired = encode.published.acquire((12,))
    encode(acquired, where=(LESS,))
    encode.autoencoder = encode.published.autoencoder(seed=1)
    assert work(encode(acquired)) == [(9, 0)]
    encode.model = encode.model.model_copy(update={"text": encode.model.text.model_copy(update={"tokens": 13})})
    assert work(encode(acquired, where=(LESS,))) == [(8, 0)]


def test_nothing_is_copied_by_force(encode: Encoding) -> None:
    acquired = encode.published.acquire((12,))
    encode(acquired, where=(LESS,))
    second = encode(acquired)
    assert work(second) == [(1, 8)]
    ask_again(encode.store, second.stage, second.key, "force")
    third = encode(acquired)
    assert work(third) == [(9, 0)]
    assert third.revision == second.revision
    assert not {unit.key for unit in third.units} & {unit.key for unit in second.units}


@pytest.mark.parametrize("name", ["inputs.npy", "cache.arrow"])
@pytest.mark.parametrize("gone", [True, False])
def test_what_is_damaged_is_encoded(encode: Encoding, name: str, gone: bool) -> None:
    acquired = encode.published.acquire((12, 8))
    first = encode(acquired, where=(LESS,))
    path = first.units[0].path(name)
    if gone:
        encode.store.delete(path)
    else:
        flip(encode.store, path)
    second = encode(acquired)
    assert work(second) == [(9, 0), (6, 0)]
    assert len(encode.rows(second)) == 15


def test_cut_captions_are_counted_whether_they_are_copied_or_not(encode: Encoding) -> None:
    captions = {2: "word " * 20, 5: "word " * 20, 6: "word " * 20}
    acquired = encode.published.acquire((12,), captions=captions)
    assert encode(acquired, where=(LESS,)).info["captions_cut"] == 2
    second = encode(acquired)
    assert (work(second), second.info["captions_cut"]) == ([(1, 8)], 3)


def test_rows_come_from_several_units_and_from_runs_that_never_ended(encode: Encoding) -> None:
    """A unit that no revision lists serves as well."""
    acquired = encode.published.acquire((12,))
    low, high = (Predicate(name="part", column="key", op=op, value="000000005") for op in ("<", ">"))
    first = encode(acquired, where=(low,))
    second = encode(acquired, where=(high,))
    assert [work(first), work(second)] == [[(4, 0)], [(4, 0)]]
    old = encode.rows(first) | encode.rows(second)
    encode.store.delete(second.path)
    third = encode(acquired)
    assert work(third) == [(1, 8)]
    assert {uid: encode.rows(third)[uid] for uid in old} == old


def test_a_shard_of_which_nothing_is_selected_any_more(encode: Encoding) -> None:
    acquired = encode.published.acquire((4, 8))
    encode(acquired)
    none_of_it = encode(acquired, where=(Predicate(name="later", column="key", op=">", value="000000003"),))
    assert work(none_of_it) == [(0, 0), (6, 0)]
    assert work(encode(acquired)) == [(3, 0), (6, 0)]
