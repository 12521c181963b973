"""Which conditions are dropped in training, so that one network learns to do without each of them, and without all
(Ho & Salimans 2022, section 3.2; per condition as Brooks et al. 2023, section 3.2.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ldm.errors import ConfigError, InputError


@dataclass(frozen=True)
class ConditionDropout:
    """How often each condition is replaced by its null, independently of the others."""

    rates: Mapping[str, float]
    """Condition to probability, in the order of the columns of uniform numbers."""
    all_rate: float = 0.0
    """Probability that all are dropped together, on top."""

    def __post_init__(self) -> None:
        for name, rate in {**self.rates, "all_rate": self.all_rate}.items():
            if not 0 <= rate <= 1:
                raise ConfigError(f"dropout of {name} = {rate}: must be from 0 to 1")

    @property
    def draws(self) -> int:
        """Uniform numbers that a sample needs: one a condition, and one for all."""
        return len(self.rates) + 1

    def dropped(self, u_BN: Tensor) -> dict[str, Tensor]:
        """Bool [B] for each condition, true where it is dropped, of uniform numbers [B, draws] in [0, 1).

        A condition is dropped with probability 1 − (1 − its rate)·(1 − all_rate). Raises `InputError` for another
        shape or range.
        """
        if u_BN.ndim != 2 or u_BN.shape[1] != self.draws:
            raise InputError(f"u is {tuple(u_BN.shape)}: must be [batch, {self.draws}]")
        if not bool(((u_BN >= 0) & (u_BN < 1)).all()):
            raise InputError(f"u has values from {u_BN.min().item()} to {u_BN.max().item()}: must be in [0, 1)")
        all_B = u_BN[:, -1] < self.all_rate
        return {name: (u_BN[:, column] < rate) | all_B for column, (name, rate) in enumerate(self.rates.items())}
