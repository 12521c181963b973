"""Units of `score`: each scorer's are its own, and rows of which it sees the same as before are copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.storage import Store
from pipelines.again import ask_again
from pipelines.artifacts import Artifact, Unit
from pipelines.dataset.facts import PartFacts
from pipelines.dataset.scores import load_features, load_scores
from pipelines.dataset.shards import decoded
from pipelines.recipe import Execution, ScoreSpec
from pipelines.score import stage

pytestmark = pytest.mark.usefixtures("in_process")

PHASH, BOTH = ScoreSpec(), ScoreSpec(features="efficientnet_lite0")


def score(spec: ScoreSpec, acquired: Artifact, store: Store, report: Any, **inputs: Artifact) -> Artifact:
    used = {"acquire": acquired} | {name.replace("_", "."): artifact for name, artifact in inputs.items()}
    return stage.score(spec, used, store, report, Execution(device="cpu"))


def work(scored: Artifact) -> dict[tuple[str, str], tuple[int, int]]:
    """Rows that were computed, and copied, by shard and scorer."""
    facts = map(PartFacts.of, scored.units)
    return {(each.shard, each.scorer): (each.computed, each.copied) for each in facts}


def spoil(store: Store, unit: Unit, suffix: str) -> None:
    """As many bytes of nothing."""
    path = unit.only(suffix)
    store.publish_bytes(path, bytes(len(store.read_bytes(path))))


def flip(store: Store, path: str) -> None:
    data = bytearray(store.read_bytes(path))
    data[len(data) // 2] ^= 1
    store.publish_bytes(path, bytes(data))


def rows_of(scored: Artifact, store: Store, shard: str, *columns: str) -> dict[str, dict[str, Any]]:
    table = load_scores(scored, store, ["key", *columns]).to_pylist()
    return {row["key"]: row for row in table if row.pop("shard") == shard}


def test_another_scorer_computes_its_own_column_and_one_less_computes_nothing(
    published: Any, store: Store, report: Any
) -> None:
    acquired = published.acquire((4, 4))
    first = score(PHASH, acquired, store, report)
    both = score(BOTH, acquired, store, report)
    assert [unit.key for unit in both.units[::2]] == [unit.key for unit in first.units]
    assert [unit.info["scorer"] for unit in both.units] == ["phash", "features"] * 2
    for unit in acquired.units:  # nothing below looks at an image
        spoil(store, unit, ".tar")
    only = score(ScoreSpec(phash=False, features="efficientnet_lite0"), acquired, store, report)
    assert [unit.key for unit in only.units] == [unit.key for unit in both.units[1::2]]
    assert score(PHASH, acquired, store, report) == first
    assert both.counts.total == both.counts.kept == first.counts.kept == acquired.counts.kept


def test_images_are_decoded_once_for_all_scorers(
    published: Any, store: Store, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(encoded: bytes, where: str) -> Any:
        calls.append(where)
        return decoded(encoded, where)

    monkeypatch.setattr("pipelines.dataset.shards.decoded", counted)
    acquired = published.acquire((8, 4))
    score(ScoreSpec(nsfw=True, features="efficientnet_lite0"), acquired, store, report)
    assert len(calls) == len(set(calls)) == acquired.counts.kept


def test_rows_of_a_shard_that_grew_are_copied_to_the_bit(published: Any, store: Store, report: Any) -> None:
    first = score(BOTH, published.acquire((4, 12)), store, report)
    acquired = published.acquire((4, 16))
    second = score(BOTH, acquired, store, report)
    assert second.units[0] == first.units[0]
    assert work(second)["00001", "phash"] == work(second)["00001", "features"] == (3, 9)
    old, new = (rows_of(scored, store, "00001", "phash", "thumbnail") for scored in (first, second))
    assert {key: new[key] for key in old} == old
    wanted = [("00001", key) for key in old]
    assert (load_features(first, store, wanted) == load_features(second, store, wanted)).all()
    elsewhere = type(published)(Store(Path(store.root).parent / "other"), Path(store.root).parent / "networks")
    anew = score(BOTH, elsewhere.acquire((4, 16)), elsewhere.store, report)
    assert anew.revision == second.revision
    assert work(anew)["00001", "phash"] == (12, 0)
    assert rows_of(anew, elsewhere.store, "00001", "phash", "thumbnail") == new
    assert any(note == "" and done == acquired.counts.kept - 3 for done, _, _, note in report.steps)


def test_a_caption_matters_to_whom_it_is_read_by(
    published: Any, trained_clip: Artifact, store: Store, report: Any
) -> None:
    spec = ScoreSpec(clip="clip")
    first = score(spec, published.acquire((8,)), store, report, train_clip=trained_clip)
    renamed = published.acquire((8,), captions={2: "something else"})
    second = score(spec, renamed, store, report, train_clip=trained_clip)
    assert work(second) == {("00000", "clip"): (1, 5), ("00000", "phash"): (0, 6)}
    old, new = (rows_of(scored, store, "00000", "clip_similarity") for scored in (first, second))
    assert [key for key in old if old[key] != new[key]] == ["000000002"]
    third = score(spec, published.acquire((8,)), store, report, train_clip=trained_clip)
    assert third == first


def test_nothing_is_copied_by_force(published: Any, store: Store, report: Any) -> None:
    score(BOTH, published.acquire((12,)), store, report)
    grown = score(BOTH, published.acquire((16,)), store, report)
    assert set(work(grown).values()) == {(3, 9)}
    ask_again(store, "score", grown.key, "force")
    again = score(BOTH, published.acquire((16,)), store, report)
    assert set(work(again).values()) == {(12, 0)}
    assert again.revision == grown.revision
    assert not {unit.key for unit in again.units} & {unit.key for unit in grown.units}


@pytest.mark.parametrize("name", ["inputs.npy", "scores.parquet", "features.npy"])
@pytest.mark.parametrize("gone", [True, False])
def test_what_is_damaged_is_computed(published: Any, store: Store, report: Any, name: str, gone: bool) -> None:
    first = score(BOTH, published.acquire((12,)), store, report)
    for unit in first.units:
        if unit.has(name):
            if gone:
                store.delete(unit.path(name))
            else:
                flip(store, unit.path(name))
    second = score(BOTH, published.acquire((16,)), store, report)
    damaged = {"inputs.npy": {"phash", "features"}, "scores.parquet": {"phash"}, "features.npy": {"features"}}[name]
    # The features' part has its rows' names in scores.parquet, and copies no value from there.
    assert work(second) == {
        ("00000", scorer): (12, 0) if scorer in damaged else (3, 9) for scorer in ("phash", "features")
    }
    elsewhere = type(published)(Store(Path(store.root).parent / "other"), Path(store.root).parent / "networks")
    anew = score(BOTH, elsewhere.acquire((16,)), elsewhere.store, report)
    assert load_scores(anew, elsewhere.store, ["phash"]).equals(load_scores(second, store, ["phash"]))
    keys = [("00000", key) for key in rows_of(second, store, "00000")]
    np.testing.assert_allclose(
        load_features(second, store, keys), load_features(anew, elsewhere.store, keys), rtol=2e-3, atol=2e-3
    )


def test_a_row_without_a_hash_of_its_image_is_computed(
    published: Any, store: Store, report: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As others' ledgers have none."""
    first = published.acquire((8,))
    score(PHASH, first, store, report)
    monkeypatch.setattr("pipelines.score.worker.LEDGER_COLUMNS", ("uid", "key", "caption"))
    assert work(score(PHASH, published.acquire((12,)), store, report)) == {("00000", "phash"): (9, 0)}


def test_no_scorer_is_no_unit(published: Any, store: Store, report: Any) -> None:
    acquired = published.acquire((4,))
    scored = score(ScoreSpec(phash=False), acquired, store, report)
    assert scored.units == ()
    assert scored.counts.kept == acquired.counts.kept
    assert load_scores(scored, store, []).num_rows == 0
