"""The forward process, what the network learns of it, and how its errors are weighed.

A noised latent is α·x₀ + σ·ε. Three kinds of process are known here:

- *discrete* (predictions eps, v, x0): 1,000 steps of variance-preserving noise, α² = ᾱₜ and σ² = 1 − ᾱₜ
  (Ho et al. 2020, eq. 4); a time is a whole number from 0 to 999;
- *flow* (prediction flow): straight paths, α = 1 − t and σ = t (Liu et al. 2022; Lipman et al. 2022);
  a time is a number from 0 to 1;
- *EDM* (prediction edm): α = 1, and a time is σ itself, above 0; input and output of the network are scaled to unit
  variance (Karras et al. 2022, table 1).

All randomness comes in from outside: noise, and uniform numbers for the times. Solving backwards is `ldm.samplers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.errors import ConfigError, InputError
from ldm.schedules import (
    check_unit_interval,
    cosine_alphas_cumprod,
    linear_alphas_cumprod,
    resolution_shift,
    scaled_linear_alphas_cumprod,
    shifted,
    zero_terminal_snr,
)

NUM_STEPS = 1000
"""Steps of the discrete process, and the scale of the times that the U-Net is given."""

Prediction = Literal["eps", "v", "x0", "flow", "edm"]
Schedule = Literal["linear", "scaled_linear", "cosine"]
TimestepSampling = Literal["uniform", "logit_normal", "log_normal"]
LossWeight = Literal["none", "min_snr", "debiased"]
Loss = Literal["mse", "huber", "pseudo_huber"]

BETAS: dict[str, tuple[float, float] | None] = {
    "linear": (1e-4, 0.02),
    "scaled_linear": (0.00085, 0.012),
    "cosine": None,
}
"""First and last β by schedule: Ho et al. 2020, section 4, and Stable Diffusion. The cosine is without a choice."""

MIN_WEIGHT = 0.05
"""Least loss weight with zero-terminal SNR: at the last step min-SNR and debiased weights are 0 for v and x0, but what
is predicted there decides an image's brightness, and has to be learned."""

SMALLEST_UNIFORM = 2.0**-25
"""Stands for a uniform number of 0 where that would be noise of σ = 0: half the step of float32 uniforms."""


@dataclass(frozen=True)
class DiffusionConfig:
    """A process, a prediction, and how they are trained.

    Raises `ConfigError` for values and combinations that make no sense; settings of another process than the
    prediction's have to be left as they are.
    """

    prediction: Prediction = "flow"
    schedule: Schedule = "scaled_linear"
    """β of the discrete process: evenly spaced, or their roots are, or they follow a cosine (Nichol & Dhariwal
    2021)."""
    beta_start: float | None = None
    """First β of the discrete process; `beta_end` is the last. None: the schedule's own."""
    beta_end: float | None = None
    zero_terminal_snr: bool = False
    """Discrete: no signal is left at the last step (Lin et al. 2023). Samplers must then begin there."""
    flow_shift: float = 1.0
    """Flow: s of `ldm.schedules.shifted`, in training and sampling."""
    flow_shift_base_pixels: int | None = None
    """Flow: latent pixels (height·width) for which `flow_shift` holds; it is multiplied by
    `ldm.schedules.resolution_shift` for others. None: it holds for all."""
    sigma_data: float = 0.5
    """EDM: standard deviation of x₀."""
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    """EDM: the first and least noise of a sampler."""
    rho: float = 7.0
    """EDM: how much of a sampler's steps are near the data (Karras et al. 2022, eq. 5)."""
    timestep_sampling: TimestepSampling | None = None
    """`logit_normal` favours the middle of a flow or discrete process (Esser et al. 2024, section 3.1); `log_normal` is
    EDM's (Karras et al. 2022, section 5). None: `log_normal` for EDM, else `uniform`."""
    p_mean: float = -1.2
    p_std: float = 1.2
    """EDM: mean and standard deviation of ln σ in training."""
    loss: Loss = "mse"
    """e² of the output's error; or beyond about `huber_delta` only as |e| grows (Huber 1964; smoothly: Charbonnier et
    al. 1997)."""
    huber_delta: float = 0.1
    loss_weight: LossWeight = "none"
    """`min_snr`: Hang et al. 2023; `debiased`: Yu et al. 2023; both for the discrete process."""
    min_snr_gamma: float = 5.0
    offset_noise: float = 0.0
    """Standard deviation of the noise that a channel's pixels share, added to their own (Guttenberg 2023)."""
    input_perturbation: float = 0.0
    """Standard deviation, relative to the noise, of what is added to the network's input but not to its target (Ning et
    al. 2023, algorithm 1: 0.1)."""

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()
        self._check_process()
        self._check_weights()

    @property
    def is_flow(self) -> bool:
        return self.prediction == "flow"

    @property
    def is_edm(self) -> bool:
        return self.prediction == "edm"

    @property
    def is_discrete(self) -> bool:
        return self.prediction in ("eps", "v", "x0")

    @property
    def process(self) -> dict[str, object]:
        """What noise levels depend on, by name: equal for models that can go on with each other's latents."""
        kind = "flow" if self.is_flow else "edm" if self.is_edm else "discrete"
        names = ("schedule", "betas", "zero_terminal_snr", "flow_shift", "flow_shift_base_pixels")
        edm = ("sigma_data", "sigma_min", "sigma_max", "rho")
        return {"kind": kind} | {name: getattr(self, name) for name in (*names, *edm)}

    @property
    def betas(self) -> tuple[float, float] | None:
        """First and last β of the discrete process, None for a cosine."""
        betas = BETAS[self.schedule]
        if betas is None:
            return None
        start, end = betas
        return (
            start if self.beta_start is None else self.beta_start,
            end if self.beta_end is None else self.beta_end,
        )

    @property
    def sampling(self) -> TimestepSampling:
        """`timestep_sampling`, or the process's own."""
        if self.timestep_sampling is not None:
            return self.timestep_sampling
        return "log_normal" if self.is_edm else "uniform"

    def _check_names(self) -> None:
        for name, kind in (
            ("prediction", Prediction),
            ("schedule", Schedule),
            ("loss", Loss),
            ("loss_weight", LossWeight),
        ):
            _check_choice(name, getattr(self, name), get_args(kind))
        if self.timestep_sampling is not None:
            _check_choice("timestep_sampling", self.timestep_sampling, get_args(TimestepSampling))

    def _check_numbers(self) -> None:
        for name in ("flow_shift", "sigma_data", "rho", "p_std", "huber_delta", "min_snr_gamma"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} = {getattr(self, name)}: must be above 0")
        for name in ("offset_noise", "input_perturbation"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} = {getattr(self, name)}: must be 0 (none) or above")
        if self.flow_shift_base_pixels is not None and self.flow_shift_base_pixels < 1:
            raise ConfigError(f"flow_shift_base_pixels = {self.flow_shift_base_pixels}: must be 1 or more")
        if not 0 < self.sigma_min < self.sigma_max < float("inf"):
            raise ConfigError(f"sigma_min = {self.sigma_min}, sigma_max = {self.sigma_max}: must be 0 < min < max")
        if self.betas is not None:
            start, end = self.betas
            if not 0 < start <= end < 1:
                raise ConfigError(f"beta_start = {start}, beta_end = {end}: must be 0 < beta_start <= beta_end < 1")

    def _check_process(self) -> None:
        """Settings that belong to another process, and what can't be learned."""
        others = {
            "discrete": ("schedule", "beta_start", "beta_end", "zero_terminal_snr"),
            "flow": ("flow_shift", "flow_shift_base_pixels"),
            "edm": ("sigma_data", "sigma_min", "sigma_max", "rho", "p_mean", "p_std"),
        }
        own = "discrete" if self.is_discrete else self.prediction
        for process, names in others.items():
            for name in names if process != own else ():
                if getattr(self, name) != getattr(DiffusionConfig, name):
                    raise ConfigError(
                        f"{name} = {getattr(self, name)!r} with prediction = {self.prediction!r}: it belongs to the"
                        f" {process} process, leave it out"
                    )
        if self.schedule == "cosine" and (self.beta_start, self.beta_end) != (None, None):
            raise ConfigError("beta_start or beta_end with schedule = 'cosine': a cosine has its own, leave them out")
        if (self.sampling == "log_normal") != self.is_edm:
            raise ConfigError(
                f"timestep_sampling = {self.sampling!r} with prediction = {self.prediction!r}: 'log_normal' is for edm,"
                " the others for the other predictions"
            )
        if self.zero_terminal_snr and self.prediction == "eps":
            raise ConfigError(
                "zero_terminal_snr with prediction = 'eps': the last step is noise alone, which says nothing of x0"
                " once the noise is known; use 'v' or 'x0'"
            )

    def _check_weights(self) -> None:
        if self.loss_weight != "none" and not self.is_discrete:
            name = {"min_snr": "min-SNR", "debiased": "debiased"}[self.loss_weight]
            raise ConfigError(
                f"loss_weight = {self.loss_weight!r} with prediction = {self.prediction!r}: {name} weights are for"
                " eps, v and x0"
            )
        if self.loss_weight == "debiased" and (self.prediction, self.schedule) == ("eps", "cosine"):
            raise ConfigError(
                "loss_weight = 'debiased' with prediction = 'eps', schedule = 'cosine': 1/sqrt(SNR) is above 10,000 at"
                " a cosine's last step; use 'v', 'x0' or another schedule"
            )


@dataclass(frozen=True)
class Diffusion:
    """One configuration's process. Times `t` are int64 [B] (discrete) or float32 [B] (flow, EDM)."""

    config: DiffusionConfig

    @property
    def alphas_cumprod(self) -> Tensor:
        """ᾱ of the discrete process, float32 [1000] on the CPU; decreasing. Not to be written to."""
        return self._alphas_cumprod_on(torch.device("cpu"))

    def alpha_sigma(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at `t`, float32 [B]."""
        if self.config.is_flow:
            return 1 - t_B.float(), t_B.float()
        if self.config.is_edm:
            return torch.ones_like(t_B, dtype=torch.float32), t_B.float()
        alpha_squared = self._alphas_cumprod_on(t_B.device)[t_B]
        return alpha_squared.sqrt(), (1 - alpha_squared).sqrt()

    def snr(self, t_B: Tensor) -> Tensor:
        """Signal-to-noise ratio α²/σ², float32 [B]."""
        alpha, sigma = self.alpha_sigma(t_B)
        return (alpha / sigma).square()

    # -- training ------------------------------------------------------------------------------------------------------

    def offset(self, noise_BCHW: Tensor, normal_BC: Tensor) -> Tensor:
        """Noise with the configuration's offset: standard normal numbers, one for each channel of each sample. It takes
        the noise's place in `noised` and in `target`."""
        return noise_BCHW + self.config.offset_noise * normal_BC[:, :, None, None]

    def perturbed(self, noise_BCHW: Tensor, normal_BCHW: Tensor) -> Tensor:
        """Noise with the configuration's input perturbation, from other standard normal noise. It takes the noise's
        place in `noised` alone: the target keeps the first."""
        return noise_BCHW + self.config.input_perturbation * normal_BCHW

    def noised(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """α·x₀ + σ·noise at `t`; the network sees `scale_input` of it."""
        alpha, sigma = self._alpha_sigma_maps(t_B, x0_BCHW)
        return alpha * x0_BCHW + sigma * noise_BCHW

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What the network learns to say: the noise, α·noise − σ·x₀ (v: Salimans & Ho 2022, appendix D), x₀, the path's
        velocity noise − x₀ (flow), or (x₀ − c_skip·x)/c_out (EDM: Karras et al. 2022, eq. 8)."""
        if self.config.prediction == "eps":
            return noise_BCHW
        if self.config.prediction == "x0":
            return x0_BCHW
        if self.config.prediction == "flow":
            return noise_BCHW - x0_BCHW
        alpha, sigma = self._alpha_sigma_maps(t_B, x0_BCHW)
        if self.config.prediction == "v":
            return alpha * noise_BCHW - sigma * x0_BCHW
        data = self.config.sigma_data
        return (sigma * x0_BCHW - data**2 * noise_BCHW) / (data * (sigma.square() + data**2).sqrt())

    def loss(self, output_BCHW: Tensor, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Weighted loss of each sample, float32 [B]: the mean over its pixels. The batch's loss is their mean."""
        error = output_BCHW.float() - self.target(x0_BCHW, noise_BCHW, t_B).float()
        return self.loss_weight(t_B) * self._penalty(error).flatten(1).mean(dim=1)

    def loss_weight(self, t_B: Tensor) -> Tensor:
        """Weight of a sample's loss, float32 [B].

        A squared error of x₀ is 1/SNR of the noise's and 1/(SNR + 1) of v's, which makes of min(SNR, γ) on x₀'s
        (min-SNR: Hang et al. 2023, section 3.4) and of 1/√SNR on the noise's (debiased: Yu et al. 2023):

        ========  ===============  ===========  =====================
        weight    eps              x0           v
        ========  ===============  ===========  =====================
        min_snr   min(SNR, γ)/SNR  min(SNR, γ)  min(SNR, γ)/(SNR + 1)
        debiased  1/√SNR           √SNR         √SNR/(SNR + 1)
        ========  ===============  ===========  =====================

        With zero-terminal SNR none is below `MIN_WEIGHT`. EDM's weight of 1 is λ(σ)·c_out² (Karras et al. 2022,
        section 5).
        """
        if self.config.loss_weight == "none":
            return torch.ones_like(t_B, dtype=torch.float32)
        snr = self.snr(t_B)
        of_x0 = snr.clamp(max=self.config.min_snr_gamma) if self.config.loss_weight == "min_snr" else snr.sqrt()
        if self.config.prediction == "eps":
            return of_x0 / snr
        weight = of_x0 / (snr + 1) if self.config.prediction == "v" else of_x0
        return weight.clamp(min=MIN_WEIGHT) if self.config.zero_terminal_snr else weight

    def timesteps_from_uniform(self, u_B: Tensor, latent_pixels: int | None = None) -> Tensor:
        """Times for uniform numbers in [0, 1), [B]; by the inverse of the distribution function, so evenly spread
        numbers (`ldm.schedules.stratified`) give evenly spread quantiles. `latent_pixels` is height·width, needed where
        the shift depends on it.

        Raises `InputError` for numbers outside [0, 1) on the CPU (a look at others would wait for their device), and if
        `latent_pixels` is needed and absent.
        """
        check_unit_interval(u_B)
        config = self.config
        if config.is_edm:
            normal = torch.special.ndtri(u_B.double().clamp(min=SMALLEST_UNIFORM))
            log_sigma: Tensor = config.p_mean + config.p_std * normal
            return log_sigma.exp().float()
        fraction = u_B.float()
        if config.sampling == "logit_normal":
            fraction = torch.special.ndtri(u_B.double()).sigmoid().float()
        if config.is_flow:
            return shifted(fraction, self.flow_shift(latent_pixels))
        return (fraction * NUM_STEPS).long().clamp(max=NUM_STEPS - 1)

    def flow_shift(self, latent_pixels: int | None = None) -> float:
        """The flow's shift for latents of height·width pixels.

        Raises `InputError` if it depends on them and they are absent.
        """
        base = self.config.flow_shift_base_pixels
        if base is None:
            return self.config.flow_shift
        if latent_pixels is None:
            raise InputError("flow_shift_base_pixels is set: the shift depends on latent_pixels, give them")
        return self.config.flow_shift * resolution_shift(latent_pixels, base)

    # -- training and sampling -----------------------------------------------------------------------------------------

    def model_time(self, t_B: Tensor) -> Tensor:
        """What the U-Net is given for `t`: the step's number; 1000·t of a flow, float32 [B]; ln(σ)/4 of EDM (Karras et
        al. 2022, c_noise), float32 [B]."""
        if self.config.is_edm:
            return t_B.float().log() / 4
        return t_B.float() * NUM_STEPS if self.config.is_flow else t_B

    def scale_input(self, x_BCHW: Tensor, sigma: Tensor | float) -> Tensor:
        """What the network sees of a noised x at noise σ, [B] or one number: x, or c_in·x of EDM, whose variance is
        1."""
        if not self.config.is_edm:
            return x_BCHW
        sigma = _over_maps(sigma, x_BCHW)
        return x_BCHW / (sigma**2 + self.config.sigma_data**2) ** 0.5

    def denoised(self, x_BCHW: Tensor, output_BCHW: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
        """The x₀ that the network's output stands for, at x = α·x₀ + σ·ε; α and σ are [B] or one number.

        EDM: c_skip·x + c_out·output (Karras et al. 2022, eq. 7 and table 1).
        """
        alpha, sigma = _over_maps(alpha, x_BCHW), _over_maps(sigma, x_BCHW)
        if self.config.prediction == "eps":
            return (x_BCHW - sigma * output_BCHW) / alpha
        if self.config.prediction == "v":
            return alpha * x_BCHW - sigma * output_BCHW
        if self.config.prediction == "flow":
            return x_BCHW - sigma * output_BCHW
        if self.config.prediction == "x0":
            return output_BCHW
        data = self.config.sigma_data
        total = sigma**2 + data**2
        return data**2 / total * x_BCHW + sigma * data / total**0.5 * output_BCHW

    def _alphas_cumprod_on(self, device: torch.device) -> Tensor:
        config = self.config
        return _alphas_cumprod(config.schedule, config.betas, config.zero_terminal_snr, device)

    def _penalty(self, error: Tensor) -> Tensor:
        """e² near 0 for all: of the same slope and curvature there."""
        delta = self.config.huber_delta
        if self.config.loss == "mse":
            return error.square()
        if self.config.loss == "huber":
            size = error.abs()
            return torch.where(size <= delta, error.square(), 2 * delta * size - delta**2)
        return 2 * delta * ((error.square() + delta**2).sqrt() - delta)

    def _alpha_sigma_maps(self, t_B: Tensor, like_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = self.alpha_sigma(t_B)
        shape = (-1, *(1,) * (like_BCHW.ndim - 1))
        return alpha.view(shape), sigma.view(shape)


def _over_maps(value: Tensor | float, like: Tensor) -> Tensor | float:
    """[B] as [B, 1, ...]; a number as it is."""
    return value.view(-1, *(1,) * (like.ndim - 1)) if isinstance(value, Tensor) else value


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} = {value!r}: must be one of {', '.join(choices)}")


@lru_cache(maxsize=32)
def _alphas_cumprod(
    schedule: Schedule, betas: tuple[float, float] | None, zero_terminal: bool, device: torch.device
) -> Tensor:
    """ᾱ, computed on the CPU, whatever the device, and taken there once."""
    if device.type != "cpu":
        return _alphas_cumprod(schedule, betas, zero_terminal, torch.device("cpu")).to(device)
    if betas is None:
        alphas_cumprod = cosine_alphas_cumprod(NUM_STEPS)
    elif schedule == "linear":
        alphas_cumprod = linear_alphas_cumprod(*betas, NUM_STEPS)
    else:
        alphas_cumprod = scaled_linear_alphas_cumprod(*betas, NUM_STEPS)
    return zero_terminal_snr(alphas_cumprod) if zero_terminal else alphas_cumprod
