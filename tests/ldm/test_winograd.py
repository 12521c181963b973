from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ldm.winograd import TILES_OF_2, TILES_OF_4, Tiling, WinogradConv2d, convolve, fits, transformed, use_winograd


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@given(
    tiling=st.sampled_from([TILES_OF_2, TILES_OF_4]),
    batch=st.integers(1, 3),
    before=st.integers(1, 9),
    after=st.integers(1, 9),
    height=st.integers(1, 50),
    width=st.integers(1, 50),
)
@settings(max_examples=40, deadline=None)
def test_it_is_the_convolution(tiling: Tiling, batch: int, before: int, after: int, height: int, width: int) -> None:
    """In float64, where nothing is lost to rounding."""
    x = torch.randn(batch, before, height, width, generator=seeded(), dtype=torch.float64)
    weight = torch.randn(after, before, 3, 3, generator=seeded(), dtype=torch.float64)
    expected = F.conv2d(x, weight, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(convolve(x, transformed(weight, tiling), tiling), expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def layer() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(128, 160, 3, padding=1).requires_grad_(False)


@pytest.mark.parametrize(
    ("side", "tilings", "most"), [(20, {TILES_OF_4}, 2e-5), (8, {TILES_OF_2}, 4e-6), (4, set(), 2e-6)]
)
def test_rounding_is_as_stated(layer: nn.Conv2d, side: int, tilings: set[Tiling], most: float) -> None:
    x = torch.randn(2, 128, side, side, generator=seeded())
    expected = F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)  # type: ignore[union-attr]
    fast = WinogradConv2d(layer)
    actual = fast(x)
    assert fast.filters.keys() == tilings
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert 0 < float((actual - expected).abs().max() / expected.abs().max()) < most


def test_parameters_are_shared_and_followed(layer: nn.Conv2d) -> None:
    x = torch.randn(4, 128, 8, 8, generator=seeded())
    network = nn.Sequential(layer)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    use_winograd(network)
    assert isinstance(network[0], WinogradConv2d)
    assert network.state_dict().keys() == state.keys()
    assert network[0].weight is layer.weight
    before = network(x)
    network.load_state_dict({name: 2 * value for name, value in state.items()})
    torch.testing.assert_close(network(x), 2 * before)
    torch.testing.assert_close(copy.deepcopy(network)(x), 2 * before)


def test_filters_are_given_back_when_weights_move_and_do_not_travel(layer: nn.Conv2d) -> None:
    x = torch.randn(4, 128, 8, 8, generator=seeded())
    network = nn.Sequential(layer)
    use_winograd(network)
    fast = network[0]
    assert isinstance(fast, WinogradConv2d)
    before = network(x)
    again = pickle.loads(pickle.dumps(fast))
    assert fast.filters
    assert not again.filters
    assert torch.equal(again(x), before)
    fast.weight.data += 1  # which leaves no trace
    use_winograd(network)
    torch.testing.assert_close(network(x), F.conv2d(x, fast.weight, fast.bias, padding=1), rtol=1e-4, atol=1e-2)
    assert not network.double()[0].filters


def test_inference_mode_does_not_stand_in_the_way_of_gradients(layer: nn.Conv2d) -> None:
    x = torch.randn(4, 128, 8, 8, generator=seeded())
    fast = WinogradConv2d(layer)
    with torch.inference_mode():
        fast(x)
        made_there = WinogradConv2d(nn.Conv2d(128, 160, 3, padding=1).requires_grad_(False))
        made_there(x)
    assert fast.filters
    assert not made_there.filters
    fast(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_where_it_does_not_apply_it_is_the_usual_convolution(layer: nn.Conv2d) -> None:
    x = torch.randn(4, 128, 8, 8, generator=seeded())
    usual = copy.deepcopy(layer)
    half = WinogradConv2d(copy.deepcopy(layer)).bfloat16()
    assert torch.equal(half(x.bfloat16()), copy.deepcopy(layer).bfloat16()(x.bfloat16()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(WinogradConv2d(layer)(x), layer(x))
    trained = WinogradConv2d(layer).requires_grad_(True)
    usual.requires_grad_(True)
    trained(x).sum().backward()
    usual(x).sum().backward()
    torch.testing.assert_close(trained.weight.grad, usual.weight.grad)


def test_gradients_reach_the_input(layer: nn.Conv2d) -> None:
    x = torch.randn(4, 128, 7, 9, generator=seeded(), requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (actual,) = torch.autograd.grad(WinogradConv2d(layer)(x).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "other",
    [
        nn.Conv2d(128, 128, 3, stride=2, padding=1),
        nn.Conv2d(128, 128, 3),
        nn.Conv2d(128, 128, 1),
        nn.Conv2d(64, 128, 3, padding=1),
        nn.Conv2d(128, 128, 3, padding=1, groups=2),
        nn.Conv2d(128, 128, 3, padding=1, padding_mode="reflect"),
        nn.Linear(128, 128),
    ],
)
def test_other_layers_are_left_alone(other: nn.Module) -> None:
    assert not fits(other)
    network = nn.Sequential(other)
    use_winograd(network)
    assert network[0] is other
