"""What units say of themselves: it comes back as it was noted, and nothing else is taken for it."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.artifacts import Counts, Unit
from pipelines.dataset.errors import DatasetError
from pipelines.dataset.facts import CacheFacts, NullFacts, PartFacts, SplitFacts, is_null

CACHE = CacheFacts(shard="0123", content="c", made_with="m", computed=3, copied=2, train=4, held_out=1, captions_cut=1)


def unit(info: Any) -> Unit:
    return Unit("encode.base", "k", (), Counts(5, 5), info)


def test_facts_come_back() -> None:
    noted = unit(CACHE.info() | {"seconds": 2.5})
    assert CacheFacts.of(noted) == CACHE
    assert SplitFacts.of(noted) == SplitFacts(train=4, held_out=1)
    part = PartFacts(shard="0123", content="c", made_with="m", computed=3, copied=2, scorer="clip")
    assert PartFacts.of(unit(part.info())) == part
    assert not is_null(noted)
    assert is_null(unit(NullFacts(content="c").info()))


@pytest.mark.parametrize(
    ("name", "value"), [("train", "4"), ("train", 4.0), ("train", True), ("shard", 7), ("shard", None)]
)
def test_what_is_missing_or_of_another_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(DatasetError, match=rf"encode.base/k says {name} {value!r} of itself.*--force encode.base"):
        CacheFacts.of(unit(CACHE.info() | {name: value}))
    with pytest.raises(DatasetError, match=rf"says {name} None"):
        CacheFacts.of(unit({key: own for key, own in CACHE.info().items() if key != name}))
