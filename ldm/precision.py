"""Where autocast to bfloat16 pays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self")
Rest = ParamSpec("Rest")
Method = Callable[Concatenate[Self, Tensor, Rest], Tensor]

_CAPABILITIES = torch.cpu.get_capabilities()
CPU_MULTIPLIES_BF16 = bool(_CAPABILITIES.get("amx_bf16") or _CAPABILITIES.get("bf16"))
"""Whether the CPU has units for products of bfloat16 matrices: AMX, or ARM's BF16. The vector instructions of AVX-512
don't help: a U-Net's training step took 1.4 to 1.8 times as long as in float32."""


def no_slow_autocast(forward: Method[Self, Rest]) -> Method[Self, Rest]:
    """Leave out autocast on CPUs where it would slow the network down, and round besides. `forward` is a method whose
    first input is the network's; it then computes in the weights' dtype."""

    @functools.wraps(forward)
    def run(self: Self, x: Tensor, /, *args: Rest.args, **kwargs: Rest.kwargs) -> Tensor:
        if CPU_MULTIPLIES_BF16 or x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return forward(self, x, *args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return forward(self, x, *args, **kwargs)

    return run
