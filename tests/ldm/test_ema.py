from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ldm.ema import Ema, decay_at
from ldm.errors import ConfigError, InputError


@given(step=st.integers(0, 10_000_000), decay=st.floats(0, 0.99999))
def test_decay_warms_up_to_its_value(step: int, decay: float) -> None:
    assert 0 <= decay_at(step, decay) <= decay_at(step + 1, decay) <= decay
    assert decay_at(10**9, decay) == decay


def test_first_decays() -> None:
    assert [decay_at(step, 0.998) for step in (0, 1, 90)] == [0.1, 2 / 11, 91 / 100]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_impossible_decays_are_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="ema_decay"):
        decay_at(0, decay)


def test_averages_follow_the_recurrence() -> None:
    network = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(0)
    ema = Ema(network.named_parameters(), 0.9)
    expected = 0.0
    for step in range(30):
        with torch.no_grad():
            network.weight.fill_(step)
        ema.update(network.named_parameters())
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(ema.averages["weight"]) == pytest.approx(expected, rel=1e-5)


def test_half_precision_weights_are_averaged_in_full() -> None:
    """An average in bf16 would not move: each step is below its resolution."""
    network = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        network.weight.fill_(1)
    ema = Ema(network.named_parameters(), 0.9999)
    ema.step = 10**7
    with torch.no_grad():
        network.weight.fill_(1.0078125)
    for _ in range(1000):
        ema.update(network.named_parameters())
    assert float(ema.averages["weight"]) == pytest.approx(1 + 0.0078125 * (1 - 0.9999**1000), abs=5e-5)


def test_averages_go_into_a_network_and_through_a_state() -> None:
    network = nn.Linear(3, 2)
    ema = Ema(network.named_parameters(), 0.5)
    with torch.no_grad():
        network.weight.add_(1)
    ema.update(network.named_parameters())
    other = Ema(nn.Linear(3, 2).named_parameters(), 0.5)
    other.load_state_dict({name: value.clone() for name, value in ema.state_dict().items()})
    assert other.step == 1
    copy = nn.Linear(3, 2)
    other.copy_to(copy)
    assert torch.equal(copy.weight, ema.averages["weight"])


def test_other_networks_are_refused() -> None:
    ema = Ema(nn.Linear(3, 2, bias=False).named_parameters(), 0.5)
    with pytest.raises(InputError, match="bias has no average"):
        ema.copy_to(nn.Linear(3, 2))
    with pytest.raises(InputError, match="other parameters: bias"):
        ema.load_state_dict(Ema(nn.Linear(3, 2).named_parameters(), 0.5).state_dict())
