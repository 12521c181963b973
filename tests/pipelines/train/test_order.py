from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.dataset.errors import UnusableData
from pipelines.train.errors import TrainError
from pipelines.train.order import Order


def make(num_rows: int = 23, lanes: int = 4, batch: int = 8, seed: int = 1, revision: str = "r") -> Order:
    return Order(seed=seed, revision=revision, num_rows=num_rows, lanes=lanes, global_batch_size=batch)


shapes = st.tuples(st.integers(1, 60), st.integers(1, 6), st.integers(1, 4)).filter(lambda s: s[0] >= s[1])


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 3), resume_at=st.integers(0, 20), world_size=st.integers(1, 6))
def test_every_sample_once_an_epoch_for_all_ranks_and_resume_points(shape, seed, resume_at, world_size):
    num_rows, lanes, share = shape
    assume(lanes * share % world_size == 0)
    before = make(num_rows, lanes, lanes * share, seed)
    seen = [sample for index in range(resume_at) for sample in before.batch(index)]
    ranks = [make(num_rows, lanes, lanes * share, seed) for _ in range(world_size)]  # as after a restart
    longest_lane = -(-num_rows // lanes)
    batches = -(-2 * longest_lane // share) + 1
    for index in range(resume_at, max(batches, resume_at)):
        for rank, order in enumerate(ranks):
            seen += order.block(index, rank, world_size)
    counts = Counter((sample.row, sample.epoch) for sample in seen)
    assert max(counts.values()) == 1
    assert {row for row, epoch in counts if epoch == 0} == set(range(num_rows))
    assert {row for row, epoch in counts if epoch == 1} == set(range(num_rows))


@settings(max_examples=60, deadline=None)
@given(shape=shapes, index=st.integers(0, 10_000), world_size=st.integers(1, 12))
def test_a_batch_is_the_same_samples_for_any_world_size(shape, index, world_size):
    num_rows, lanes, share = shape
    assume(lanes * share % world_size == 0)
    alone = make(num_rows, lanes, lanes * share).batch(index)
    together = [
        sample
        for rank in range(world_size)
        for sample in make(num_rows, lanes, lanes * share).block(index, rank, world_size)
    ]
    assert together == alone


def test_batches_can_be_asked_for_in_any_order():
    forwards = [make().batch(index) for index in range(12)]
    order = make()
    assert [order.batch(index) for index in reversed(range(12))] == forwards[::-1]


def test_ranks_own_whole_lanes_where_they_divide_them():
    order = make(num_rows=40, lanes=4, batch=8)
    rows_of = [{s.row for index in range(20) for s in order.block(index, rank, 2)} for rank in range(2)]
    assert rows_of == [set(range(20)), set(range(20, 40))]


def test_a_batch_takes_equal_shares_of_every_lane():
    order = make(num_rows=40, lanes=4, batch=8)
    for index in range(10):
        assert Counter(sample.row // 10 for sample in order.batch(index)) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_a_batch_has_each_stratum_once_and_no_lane_keeps_to_some():
    order = make(num_rows=40, lanes=4, batch=8)
    of_lanes: dict[int, Counter[int]] = {lane: Counter() for lane in range(4)}
    for index in range(2000):
        batch = order.batch(index)
        assert {sample.stratum for sample in batch} == set(range(8))
        for sample in batch:
            of_lanes[sample.row // 10][sample.stratum] += 1
    # 4,000 draws a lane, 500 a stratum: five standard deviations.
    assert all(abs(seen[stratum] - 500) < 5 * 21 for seen in of_lanes.values() for stratum in range(8))


def test_epochs_seeds_and_revisions_are_shuffled_differently():
    def first_rows(order: Order, epoch: int) -> list[int]:
        samples = (sample for index in range(80) for sample in order.batch(index))
        return [sample.row for sample in samples if sample.epoch == epoch]

    reference = make(num_rows=160, lanes=1, batch=4)
    orders = [
        first_rows(reference, 0),
        first_rows(reference, 1),
        first_rows(make(num_rows=160, lanes=1, batch=4, seed=2), 0),
        first_rows(make(num_rows=160, lanes=1, batch=4, revision="s"), 0),
    ]
    assert all(sorted(rows) == list(range(160)) for rows in orders)
    assert len({tuple(rows) for rows in orders}) == 4


def test_the_order_is_a_contract_that_does_not_change():
    first, hundredth = make().batch(0), make().batch(100)
    assert [(sample.row, sample.epoch) for sample in first] == GOLDEN_FIRST
    assert [(sample.row, sample.epoch) for sample in hundredth] == GOLDEN_HUNDREDTH
    assert [samples[0].stratum for samples in (first, make().batch(1))] == [1, 3]


def test_fewer_rows_than_lanes_is_refused():
    with pytest.raises(UnusableData, match=r"3 samples .* fewer than lanes \(4\)"):
        make(num_rows=3)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(TrainError, match="must divide global_batch_size"):
        make(batch=9)
    with pytest.raises(TrainError, match=r"ranks \(3\) must divide"):
        make().block(0, 0, 3)


GOLDEN_FIRST = [(0, 0), (1, 0), (7, 0), (5, 0), (16, 0), (14, 0), (19, 0), (21, 0)]
GOLDEN_HUNDREDTH = [(2, 40), (1, 40), (9, 33), (5, 33), (16, 33), (15, 33), (17, 33), (21, 33)]
