"""Where ZeRO keeps this rank's share of the fp32 weights and Adam moments, as views by parameter name.

DeepSpeed has no public interface for that which serves all stages, so this module names every private attribute of
its optimizers that the project relies on; `tests/infra/test_engine.py` pins what they mean. It imports no DeepSpeed:
it is handed the optimizers that `infra.engine` made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from infra.shards import Fragment, Kind


class Partition(ABC):
    """The share of one rank. Views stay valid, and are written to by the optimizer, as long as the engine lives."""

    def __init__(self, optimizer: Any, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._adam_state = [self._create_adam_state(flat) for flat in self._flat_masters()]

    @abstractmethod
    def fragments(self) -> dict[str, Fragment]:
        """What this rank owns of each parameter; of length 0 where it owns nothing."""

    @abstractmethod
    def views(self, kind: Kind) -> dict[str, torch.Tensor]:
        """Flat fp32 views of the fp32 weights or a moment, by parameter name, each as long as its fragment."""

    @abstractmethod
    def refresh_weights(self) -> None:
        """Give the module the fp32 weights, after they were written to. Called by every rank."""

    @abstractmethod
    def _flat_masters(self) -> list[torch.Tensor]:
        """The flat fp32 tensors that the torch optimizer updates."""

    def optimizer_step(self) -> int:
        """Updates that were applied: Adam's bias correction counts them."""
        return int(self._adam_state[0]["step"].item())

    def set_optimizer_step(self, step: int) -> None:
        for state in self._adam_state:
            state["step"].fill_(float(step))

    def _create_adam_state(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """What fused AdamW creates in its first step; made here, so that a state can be loaded before that."""
        state: dict[str, torch.Tensor] = self._optimizer.optimizer.state[flat]
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
        state["exp_avg"] = torch.zeros_like(flat, requires_grad=False)
        state["exp_avg_sq"] = torch.zeros_like(flat, requires_grad=False)
        return state


class FlatPartition(Partition):
    """Stages 1 and 2: all parameters in one flat tensor, of which each rank owns an equal part."""

    def __init__(self, optimizer: Any, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        super().__init__(optimizer, parameters)
        optimizer._lazy_init_hp_params_optimizer_state()

    def fragments(self) -> dict[str, Fragment]:
        found = {}
        for name, parameter in self._parameters.items():
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # None: owned by others
            address = None if mapping is None else mapping.lp_fragment_address
            found[name] = Fragment(0, 0) if address is None else Fragment(int(address.start), int(address.numel))
        return found

    def views(self, kind: Kind) -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in self._parameters.items():
            mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                found[name] = torch.empty(0)
            else:
                found[name] = mapping.get_hp_fragment(None if kind == "weight" else kind).detach()
        return found

    def refresh_weights(self) -> None:
        self._optimizer.update_lp_params()

    def _flat_masters(self) -> list[torch.Tensor]:
        return list(self._optimizer.single_partition_of_fp32_groups)


class ParameterPartition(Partition):
    """Stage 3: every parameter is cut in equal parts, the last of which may be padded."""

    def fragments(self) -> dict[str, Fragment]:
        found = {}
        for name, parameter in self._parameters.items():
            share: Any = parameter
            part = int(share.partition_numel())
            start = part * int(self._optimizer._get_param_partition_rank(parameter))
            found[name] = Fragment(start, max(0, min(part, int(share.ds_numel) - start)))
        return found

    def views(self, kind: Kind) -> dict[str, torch.Tensor]:
        found = {}
        key = None if kind == "weight" else kind
        for name, fragment in self.fragments().items():
            padded, _ = self._optimizer._get_fp32_opt_state_partition(
                self._parameters[name], release_swap_buffers=True, optim_state_key=key
            )
            found[name] = padded.detach().narrow(0, 0, fragment.length)
        return found

    def refresh_weights(self) -> None:
        # Releases what is gathered, persistent parameters too; the next forward pass gathers what was copied.
        self._optimizer._partition_all_parameters()
        for group in range(len(self._optimizer.fp16_groups)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(group)

    def _flat_masters(self) -> list[torch.Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)
