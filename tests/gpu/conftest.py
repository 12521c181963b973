"""The devices that the tests of this folder run on: `-m gpu` is a GPU, which they are for, and `-m slow` the CPU, where
they can be tried without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(
    scope="module",
    params=[pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> str:
    """Where to compute. Of the CPU, other tests say more: here it only says that the tests for a GPU work."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return str(request.param)


@pytest.fixture(scope="module", autouse=True)
def _whole_float32() -> Iterator[None]:
    """Products of float32 in float32: convolutions on a GPU have 10 bits of mantissa otherwise (TF32), which is 1e-3,
    and what is compared with the CPU's is to be nearer."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
