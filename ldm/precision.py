"""Where autocast to bfloat16 pays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

Inputs = ParamSpec("Inputs")

_CAPABILITIES = torch.cpu.get_capabilities()
CPU_MULTIPLIES_BF16 = bool(_CAPABILITIES.get("amx_bf16") or _CAPABILITIES.get("bf16"))
"""Whether the CPU has units for products of bfloat16 matrices: AMX, or ARM's BF16. The vector instructions of AVX-512
don't help: a U-Net's training step took 1.4 to 1.8 times as long as in float32."""


def no_slow_autocast(forward: Callable[Inputs, Tensor]) -> Callable[Inputs, Tensor]:
    """Leave out autocast to bfloat16 on CPUs where it would slow the network down, and round besides: `forward` then
    computes in the weights' dtype. Where it computes is told by the first tensor that it is given."""

    @functools.wraps(forward)
    def run(*args: Inputs.args, **kwargs: Inputs.kwargs) -> Tensor:
        if CPU_MULTIPLIES_BF16 or not torch.is_autocast_enabled("cpu"):
            return forward(*args, **kwargs)
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if first.device.type != "cpu" or torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return forward(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return forward(*args, **kwargs)

    return run
