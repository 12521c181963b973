import pytest

from pipelines.recipe import Optimizer, TrainSpec
from pipelines.train.schedule import learning_rate, progress


@pytest.mark.parametrize(
    ("step", "minutes", "expected"),
    [(0, 0, 0.0), (50, 1, 0.5), (50, 3, 0.75), (100, 0, 1.0), (10, 8, 1.0)],
)
def test_progress_is_the_further_of_steps_and_minutes(step, minutes, expected):
    assert progress(TrainSpec(steps=100, max_minutes=4.0), step, 60 * minutes) == expected


def test_without_a_time_limit_steps_alone_count():
    assert progress(TrainSpec(steps=100), 25, 1e9) == 0.25


def test_warm_up_then_cosine_to_zero():
    optimizer = Optimizer(learning_rate=2e-3, warmup_steps=10, schedule="cosine")
    assert learning_rate(optimizer, 0, 0.0) == pytest.approx(2e-4)
    assert learning_rate(optimizer, 9, 0.0) == pytest.approx(2e-3)
    assert learning_rate(optimizer, 500, 0.5) == pytest.approx(1e-3)
    assert learning_rate(optimizer, 1000, 1.0) == pytest.approx(0.0)


def test_constant_after_warm_up():
    optimizer = Optimizer(learning_rate=2e-3, warmup_steps=0)
    assert {learning_rate(optimizer, step, step / 10) for step in range(11)} == {2e-3}
