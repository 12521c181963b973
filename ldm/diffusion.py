"""The forward process and what the network learns of it.

A noised latent is α·x₀ + σ·ε. Two kinds of process are known here:

- *discrete* (predictions eps, v, x0): 1,000 steps of variance-preserving noise, α² = ᾱₜ and σ² = 1 − ᾱₜ
  (Ho et al. 2020, eq. 4); a time is a whole number from 0 to 999;
- *flow* (prediction flow): straight paths, α = 1 − t and σ = t (Liu et al. 2022; Lipman et al. 2022);
  a time is a number from 0 to 1.

All randomness comes in from outside: noise, and uniform numbers for the times. Solving backwards is `ldm.samplers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.errors import ConfigError, InputError

NUM_STEPS = 1000
"""Steps of the discrete process, and the scale of the times that the U-Net is given."""

Prediction = Literal["eps", "v", "x0", "flow"]
Schedule = Literal["linear", "scaled_linear"]
TimestepSampling = Literal["uniform", "logit_normal"]
LossWeight = Literal["none", "min_snr"]

BETAS: dict[str, tuple[float, float]] = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
"""First and last β by schedule: Ho et al. 2020, section 4, and Stable Diffusion."""


@dataclass(frozen=True)
class DiffusionConfig:
    """A process, a prediction, and how they are trained."""

    prediction: Prediction = "flow"
    schedule: Schedule = "scaled_linear"
    """β of the discrete process: evenly spaced, or their roots are. A flow has none, and takes no notice."""
    beta_start: float | None = None
    """None: the schedule's own, as is `beta_end`'s."""
    beta_end: float | None = None
    timestep_sampling: TimestepSampling = "uniform"
    """`logit_normal` favours the middle of the process (Esser et al. 2024, section 3.1)."""
    loss_weight: LossWeight = "none"
    """`min_snr`: Hang et al. 2023; for the discrete process."""
    min_snr_gamma: float = 5.0

    def __post_init__(self) -> None:
        for name, kind in (
            ("prediction", Prediction),
            ("schedule", Schedule),
            ("timestep_sampling", TimestepSampling),
            ("loss_weight", LossWeight),
        ):
            if getattr(self, name) not in get_args(kind):
                raise ConfigError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(get_args(kind))}")
        if self.loss_weight == "min_snr" and self.is_flow:
            raise ConfigError("loss_weight = 'min_snr' with prediction = 'flow': min-SNR weights are for eps, v and x0")
        if self.min_snr_gamma <= 0:
            raise ConfigError(f"min_snr_gamma = {self.min_snr_gamma}: must be above 0")
        start, end = self.betas
        if not 0 < start <= end < 1:
            raise ConfigError(f"beta_start = {start}, beta_end = {end}: must be 0 < beta_start <= beta_end < 1")

    @property
    def is_flow(self) -> bool:
        return self.prediction == "flow"

    @property
    def betas(self) -> tuple[float, float]:
        """First and last β of the discrete process."""
        start, end = BETAS[self.schedule]
        return (
            start if self.beta_start is None else self.beta_start,
            end if self.beta_end is None else self.beta_end,
        )


@dataclass(frozen=True)
class Diffusion:
    """One configuration's process. Times `t` are int64 [B] (discrete) or float32 [B] (flow)."""

    config: DiffusionConfig

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ of the discrete process, float32 [1000] on the CPU; decreasing. Not to be written to."""
        return _alphas_cumprod(self.config.schedule, *self.config.betas)

    def alpha_sigma(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at `t`, float32 [B]."""
        if self.config.is_flow:
            return 1 - t_B.float(), t_B.float()
        alpha_squared = self.alphas_cumprod.to(t_B.device)[t_B]
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    def snr(self, t_B: Tensor) -> Tensor:
        """Signal-to-noise ratio α²/σ², float32 [B]."""
        alpha, sigma = self.alpha_sigma(t_B)
        return (alpha / sigma).square()

    def noised(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """α·x₀ + σ·noise: what the network sees at `t`."""
        alpha, sigma = self._over_maps(t_B, x0_BCHW)
        return alpha * x0_BCHW + sigma * noise_BCHW

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What the network learns to say: the noise, α·noise − σ·x₀ (v: Salimans & Ho 2022, appendix D), x₀, or the
        path's velocity noise − x₀ (flow)."""
        if self.config.prediction == "eps":
            return noise_BCHW
        if self.config.prediction == "x0":
            return x0_BCHW
        if self.config.prediction == "flow":
            return noise_BCHW - x0_BCHW
        alpha, sigma = self._over_maps(t_B, x0_BCHW)
        return alpha * noise_BCHW - sigma * x0_BCHW

    def loss_weight(self, t_B: Tensor) -> Tensor:
        """Weight of a sample's squared error, float32 [B].

        Min-SNR (Hang et al. 2023, section 3.4): min(SNR, γ) on x₀'s error, which is min(SNR, γ)/SNR on the noise's and
        min(SNR, γ)/(SNR + 1) on the velocity's.
        """
        if self.config.loss_weight == "none":
            return torch.ones_like(t_B, dtype=torch.float32)
        snr = self.snr(t_B)
        weight = snr.clamp(max=self.config.min_snr_gamma)
        if self.config.prediction == "eps":
            return weight / snr
        return weight / (snr + 1) if self.config.prediction == "v" else weight

    def model_time(self, t_B: Tensor) -> Tensor:
        """What the U-Net is given for `t`: the step's number; 1000·t of a flow, float32 [B]."""
        return t_B.float() * NUM_STEPS if self.config.is_flow else t_B

    def timesteps_from_uniform(self, u_B: Tensor) -> Tensor:
        """Times for uniform numbers in [0, 1), [B]; by the inverse of the distribution function, so evenly spread
        numbers give evenly spread quantiles.

        Raises `InputError` for numbers outside [0, 1).
        """
        if not bool(((u_B >= 0) & (u_B < 1)).all()):
            raise InputError(f"u has values from {u_B.min().item()} to {u_B.max().item()}: must be in [0, 1)")
        fraction = u_B.float()
        if self.config.timestep_sampling == "logit_normal":
            fraction = torch.special.ndtri(u_B.double()).sigmoid().float()
        if self.config.is_flow:
            return fraction
        return (fraction * NUM_STEPS).long().clamp(max=NUM_STEPS - 1)

    def _over_maps(self, t_B: Tensor, like_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t_B)
        shape = (-1, *(1,) * (like_BCHW.ndim - 1))
        return alpha.view(shape), sigma.view(shape)


def denoised(prediction: Prediction, x: Tensor, output: Tensor, alpha: float, sigma: float) -> Tensor:
    """The x₀ that a network's output stands for, at x = α·x₀ + σ·ε."""
    if prediction == "eps":
        return (x - sigma * output) / alpha
    if prediction == "v":
        return alpha * x - sigma * output
    if prediction == "flow":
        return x - sigma * output
    return output


@lru_cache(maxsize=8)
def _alphas_cumprod(schedule: Schedule, start: float, end: float) -> Tensor:
    if schedule == "linear":
        betas = torch.linspace(start, end, NUM_STEPS, dtype=torch.float32)
    else:
        betas = torch.linspace(start**0.5, end**0.5, NUM_STEPS, dtype=torch.float32).square()
    return (1 - betas).cumprod(dim=0)
