"""The account of a run: neighbouring stages are held against each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from asked import asked

from infra.storage import Store
from pipelines.artifacts import Artifact, Counts, CountsMismatch
from pipelines.building import building
from pipelines.dataset.funnel import funnel
from pipelines.publishing import publish_unit

Chain = Callable[..., dict[str, Artifact]]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    store = Store(tmp_path / "store")

    def artifact(stage: str, counts: Counts, train: int = 0) -> Artifact:
        with building(store, stage, asked({"counts": counts.to_json()}), {}, {}, 1) as build:
            return build.publish([publish_unit(store, stage, build.unit_key({}), {}, counts, {"train": train})])

    def make(
        acquired: int = 8, selected: int = 6, encoded: int = 6, in_train: int = 5, trained: int = 5
    ) -> dict[str, Artifact]:
        return {
            "acquire": artifact("acquire", Counts(10, acquired, {"opt_out": 1}, {"dead": 9 - acquired})),
            "select": artifact("select", Counts(8, selected, {"duplicate": 8 - selected})),
            "encode.base": artifact("encode.base", Counts(encoded, encoded), in_train),
            "train.base": artifact("train.base", Counts(trained, trained)),
        }

    return make


def test_a_chain_that_fits_is_one_account_from_urls_to_samples(chain: Chain) -> None:
    steps = funnel(chain()).steps
    assert [(step.node, step.total, step.kept) for step in steps] == [
        ("acquire", 10, 8),
        ("select", 8, 6),
        ("encode.base", 6, 6),
    ]
    lost = sum(sum(step.dropped.values()) + sum(step.failed.values()) for step in steps)
    assert steps[0].total == lost + steps[-1].kept


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"acquired": 7}, "acquire let 7 pairs go on, but select took in 8"),
        ({"encoded": 5}, "select let 6 samples go on, but encode.base took in 5"),
        ({"trained": 4}, "encode.base holds 5 samples of the train split, but train.base trained on 4"),
    ],
)
def test_neighbours_that_disagree_are_refused(chain: Chain, wrong: dict[str, int], message: str) -> None:
    with pytest.raises(CountsMismatch, match=message):
        funnel(chain(**wrong))
