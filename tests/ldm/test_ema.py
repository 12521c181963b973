from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ldm.ema import LARGEST_SIGMA_REL, Constant, Ema, EmaHorizons, Power, Profile, decay_at
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_update_is_that_of_each_parameter_alone(dtype: torch.dtype) -> None:
    """Of several shapes and memory formats, in whatever precision: one recurrence for each value."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(4, 2)).to(dtype).to(memory_format=torch.channels_last)
    ema = Ema(network.named_parameters(), 0.7)
    expected = {name: value.detach().double() for name, value in network.named_parameters()}
    for step in range(5):
        with torch.no_grad():
            for value in network.parameters():
                value.add_(torch.randn_like(value))
        ema.update(reversed(list(network.named_parameters())))
        decay = decay_at(step, 0.7)
        for name, value in network.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach().double()
    for name, average in ema.averages.items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)  # float32 sums


def test_parameters_that_are_not_those_of_the_start_are_refused() -> None:
    """A missing one was left as it was, and one of another shape spread over all its average, without a word."""
    ema = Ema([("a", torch.zeros(3)), ("b", torch.zeros(2))], 0.5)
    for wrong, message in (
        ([("a", torch.ones(3))], "EMA update has other parameters: b"),
        ([("a", torch.ones(3)), ("b", torch.ones(2)), ("c", torch.ones(2))], "other parameters: c"),
        ([("a", torch.ones(3)), ("b", torch.ones(1))], r"b is \(1,\) in the EMA update, \(2,\) in the averages"),
    ):
        with pytest.raises(InputError, match=message):
            ema.update(wrong)
    with pytest.raises(InputError, match="has no step"):
        ema.load_state_dict({"a": torch.zeros(3), "b": torch.zeros(2)})
    with pytest.raises(InputError, match=r"a is \(1,\) in the EMA state"):
        ema.load_state_dict({"step": torch.tensor(4), "b": torch.ones(2), "a": torch.ones(1)})
    assert (ema.step, float(sum(average.abs().sum() for average in ema.averages.values()))) == (0, 0)
    network = nn.Linear(3, 2)
    wide = Ema([("bias", torch.ones(2)), ("weight", torch.ones(1, 3))], 0.5)
    with pytest.raises(InputError, match=r"weight is \(2, 3\) in the network"):
        wide.copy_to(network)
    assert not (network.bias == 1).all()


def weights_of(profile: Profile, updates: int) -> list[float]:
    """What each update's value counts for in the average, by giving each in turn the value 1."""
    found = []
    for one in range(updates):
        ema = Ema([("w", torch.zeros(1))], profile)
        for step in range(updates):
            ema.update([("w", torch.full((1,), float(step == one)))])
        found.append(float(ema.averages["w"]))
    return found


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.15, 0.25])
def test_power_profile_weighs_updates_by_its_formula(sigma_rel: float) -> None:
    """The integral of t^γ over each update's share of the training, of which the weights telescope."""
    exponent, updates = Power(sigma_rel).exponent, 20
    power = exponent + 1
    expected = [((i + 1) ** power - i**power) / updates**power for i in range(updates)]
    assert weights_of(Power(sigma_rel), updates) == pytest.approx(expected, abs=1e-6)


@given(sigma_rel=st.floats(0.01, LARGEST_SIGMA_REL))
def test_power_profile_has_its_width(sigma_rel: float) -> None:
    """The standard deviation of a density ∝ t^γ on [0, 1]."""
    exponent = Power(sigma_rel).exponent
    mean = (exponent + 1) / (exponent + 2)
    variance = (exponent + 1) / (exponent + 3) - mean**2
    assert math.sqrt(variance) == pytest.approx(sigma_rel, rel=1e-4)


def test_power_profile_of_the_paper() -> None:
    """Karras et al. 2024: σ_rel of 0.05, 0.10 and 0.15 are γ of about 16.97, 6.94 and 3.56."""
    assert [Power(sigma).exponent for sigma in (0.05, 0.10, 0.15)] == pytest.approx([16.97, 6.94, 3.56], abs=0.01)


def test_widest_power_profile_is_the_plain_mean() -> None:
    assert weights_of(Power(LARGEST_SIGMA_REL), 8) == pytest.approx([1 / 8] * 8, abs=1e-5)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3])
def test_impossible_widths_are_refused(sigma_rel: float) -> None:
    with pytest.raises(ConfigError, match="sigma_rel"):
        Power(sigma_rel)


PROFILES = {"short": Constant(0.2), "long": Constant(0.6), "power": Power(0.1)}


def test_several_horizons_are_those_of_each_alone() -> None:
    network = nn.Linear(3, 2)
    together = EmaHorizons(network.named_parameters(), PROFILES)
    alone = {name: Ema(network.named_parameters(), profile) for name, profile in PROFILES.items()}
    for _ in range(25):
        with torch.no_grad():
            network.weight.add_(torch.randn(2, 3))
        together.update(network.named_parameters())
        for ema in alone.values():
            ema.update(network.named_parameters())
    other = EmaHorizons(nn.Linear(3, 2).named_parameters(), PROFILES)
    other.load_state_dict({key: value.clone() for key, value in together.state_dict().items()})
    copies = {name: nn.Linear(3, 2) for name in PROFILES}
    for name, copy in copies.items():
        other.copy_to(copy, name)
        assert torch.equal(copy.weight, alone[name].averages["weight"])
        assert other.horizons[name].step == 25
    assert not torch.equal(copies["short"].weight, copies["long"].weight)


def test_horizons_that_are_not_there_are_refused() -> None:
    network = nn.Linear(1, 1)
    horizons = EmaHorizons(network.named_parameters(), PROFILES)
    with pytest.raises(InputError, match="'longest': must be one of short, long, power"):
        horizons.copy_to(network, "longest")
    with pytest.raises(InputError, match=r"profiles \['short'\]"):
        horizons.load_state_dict(EmaHorizons(network.named_parameters(), {"short": Constant(0.9)}).state_dict())
    with pytest.raises(ConfigError, match="at least one"):
        EmaHorizons(network.named_parameters(), {})
    with pytest.raises(ConfigError, match="slash"):
        EmaHorizons(network.named_parameters(), {"a/b": Constant(0.9)})
    with pytest.raises(ConfigError, match="ema_decay"):
        Constant(1.0)
