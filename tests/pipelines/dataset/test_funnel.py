from __future__ import annotations

import pytest

from pipelines.artifacts import Artifact, Counts, CountsMismatch, Unit
from pipelines.dataset.funnel import funnel


def artifact(stage: str, counts: Counts, train: int = 0) -> Artifact:
    unit = Unit(stage, "k", (), counts, {"train": train})
    return Artifact(stage, "key", "revision", (unit,), {"counts": counts.to_json(), "info": {}})


def chain(
    acquired: int = 8, selected: int = 6, encoded: int = 6, in_train: int = 5, trained: int = 5
) -> dict[str, Artifact]:
    return {
        "acquire": artifact("acquire", Counts(10, acquired, {"opt_out": 1}, {"dead": 9 - acquired})),
        "select": artifact("select", Counts(8, selected, {"duplicate": 8 - selected})),
        "encode.base": artifact("encode.base", Counts(encoded, encoded), in_train),
        "train.base": artifact("train.base", Counts(trained, trained)),
    }


def test_a_chain_that_fits_is_one_account_from_urls_to_samples() -> None:
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
def test_neighbours_that_disagree_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(CountsMismatch, match=message):
        funnel(chain(**wrong))
