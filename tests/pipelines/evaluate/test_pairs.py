"""Which real pairs a model is measured against."""

from __future__ import annotations

from typing import Any

import pyarrow.parquet as pq
import pytest

from infra.storage import Store
from pipelines.dataset.errors import UnusableData
from pipelines.evaluate.pairs import Comparison, choose_pairs
from pipelines.recipe import EvaluateSpec


@pytest.fixture
def chosen(published: Any, store: Store) -> Any:
    """For settings of `EvaluateSpec`, the comparison and the selection's rows by uid."""

    def choose(captions: dict[int, str] | None = None, **settings: int) -> tuple[Comparison, dict[str, Any]]:
        acquired = published.acquire((40, 40, 16), captions=captions)
        selected = published.select(acquired)
        rows = pq.read_table(store.open(selected.units[0].path("selection.parquet"))).to_pylist()
        return choose_pairs(acquired, selected, store, EvaluateSpec(**settings)), {row["uid"]: row for row in rows}

    return choose


def test_two_halves_of_the_train_split_share_nothing(chosen: Any) -> None:
    found, rows = chosen(images=1000)
    train = {uid for uid, row in rows.items() if row["split"] == "train"}
    described, reference = ({pair.uid for pair in half} for half in (found.described, found.reference))
    assert len(found.described) == len(found.reference) == len(train) // 2
    assert not described & reference
    assert described | reference <= train
    assert found.num_train == len(train)
    assert {pair.uid for pair in found.held_out} == set(rows) - train


def test_pairs_know_their_place_and_caption(chosen: Any) -> None:
    found, rows = chosen(images=10)
    for split in ("train", "held_out"):
        order = [uid for uid, row in rows.items() if row["split"] == split]
        for pair in (pair for pair in found.pairs if pair.split == split):
            assert order[pair.row] == pair.uid
            assert (pair.shard, pair.key) == (rows[pair.uid]["shard"], rows[pair.uid]["key"])
            assert f", {int(pair.key)} noto style" in pair.caption
            assert pair.stored_px is None


def test_fewer_are_a_part_of_more_and_another_seed_draws_others(chosen: Any) -> None:
    many, _ = chosen(images=20, prompts=9)
    few, _ = chosen(images=8, prompts=4)
    other, _ = chosen(images=8, prompts=4, seed=1)
    assert len(few.described) == len(few.reference) == 8
    assert few.described == many.described[:8]
    assert few.held_out == many.held_out[:4]
    assert {pair.uid for pair in other.described} != {pair.uid for pair in few.described}


def test_prompts_differ(chosen: Any) -> None:
    """Half of all captions say the same; it is asked for once on each side."""
    found, _ = chosen(captions=dict.fromkeys(range(0, 96, 2), "a sun"), images=30, prompts=6)
    seen = [found.described[place].caption for place in found.seen]
    held_out = [pair.caption for pair in found.held_out]
    assert len(set(seen)) == len(seen) == 6
    assert len(set(held_out)) == len(held_out)
    assert [pair.caption for pair in found.described].count("a sun") > 1
    assert "a sun" in seen
    assert "a sun" in held_out


def test_a_selection_of_other_shards_is_refused(published: Any, store: Store) -> None:
    selected = published.select(published.acquire((40, 40)))
    with pytest.raises(UnusableData, match="which `acquire` did not publish"):
        choose_pairs(published.acquire((40,)), selected, store, EvaluateSpec())
