"""The usual ways to choose the noise levels that a solver goes through.

The levels are those of diffusers' schedulers, so that a model gives the same images there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from ldm.diffusion import NUM_STEPS, Diffusion
from ldm.errors import ConfigError
from ldm.samplers.level import Level, Levels
from ldm.samplers.options import SamplerOptions, Spacing
from ldm.schedules import shifted

Array = NDArray[np.floating[Any]]
DEFAULT = SamplerOptions()


class LevelsOf(Protocol):
    """Diffusion, steps, spacing (None: the sampler's own), latent pixels where a flow's shift depends on them, and
    options to levels."""

    def __call__(
        self,
        diffusion: Diffusion,
        steps: int,
        spacing: Spacing | None = ...,
        latent_pixels: int | None = ...,
        options: SamplerOptions = ...,
    ) -> Levels: ...


RHO = 7.0
"""Karras et al. 2022, appendix D.1: near the best for images."""

LEAST_ALPHAS_CUMPROD = 2.0**-24
"""ᾱ of the last step where σ/α is needed and would be without bound (zero-terminal SNR)."""

FLOW_MARGIN = 1e-6
"""UniPC begins a flow this far below t = 1, where log(α/σ) is without bound."""


# -- families ----------------------------------------------------------------------------------------------------------


def ddim_levels(
    diffusion: Diffusion,
    steps: int,
    spacing: Spacing | None = None,
    latent_pixels: int | None = None,
    options: SamplerOptions = DEFAULT,
) -> Levels:
    """Whole steps of the discrete process, `leading` by default (`trailing` with zero-terminal SNR).

    `leading` ends at step 0's noise, as Stable Diffusion does, the others without noise. Other processes take
    `euler_levels`.
    """
    return _whole_step_levels(diffusion, steps, spacing, latent_pixels, options, ends_noisy=options.ends_noisy)


def ddpm_levels(
    diffusion: Diffusion,
    steps: int,
    spacing: Spacing | None = None,
    latent_pixels: int | None = None,
    options: SamplerOptions = DEFAULT,
) -> Levels:
    """The levels of DDPM: as `ddim_levels`, but always down to no noise."""
    return _whole_step_levels(diffusion, steps, spacing, latent_pixels, options, ends_noisy=False)


def euler_levels(
    diffusion: Diffusion,
    steps: int,
    spacing: Spacing | None = None,
    latent_pixels: int | None = None,
    options: SamplerOptions = DEFAULT,
) -> Levels:
    """Times from the last step to the first, `linspace` by default and then fractional; then no noise.

    On a flow: t from 1 to 1/1000 before the shift (`linspace`), or to 1/steps (`trailing`), then 0.
    """
    _check_steps(steps)
    if diffusion.config.is_edm:
        return _edm_levels(diffusion, steps, spacing)
    if diffusion.config.is_flow:
        shift = diffusion.flow_shift(latent_pixels)
        # diffusers shifts the least time, and then all, so this one twice.
        least = {"linspace": shifted(1 / NUM_STEPS, shift), "trailing": 1 / steps}[_flow_spacing(spacing)]
        return _flow_levels(shifted(np.linspace(1, least, steps), shift), whole_times=False)
    spacing = spacing or "linspace"
    if spacing == "karras":
        within = _times(diffusion, steps, options.karras_within, options, points=steps)
        return _karras_levels(diffusion, steps, options, within=within)
    times = _times(diffusion, steps, spacing, options, points=steps)
    return _discrete_levels(diffusion, times, starts_scaled=spacing != "leading")


def dpmpp_levels(
    diffusion: Diffusion,
    steps: int,
    spacing: Spacing | None = None,
    latent_pixels: int | None = None,
    options: SamplerOptions = DEFAULT,
) -> Levels:
    """Whole times from the last step down to, but without, the first, `linspace` by default; then no noise.

    On a flow: t from 0.999 down in even steps to 0 before the shift (`linspace`), or from 1 in steps of 1/steps; the
    U-Net is given 1000·t without its fraction.
    """
    _check_steps(steps)
    if diffusion.config.is_flow and _flow_spacing(spacing) == "linspace":
        t = (1.0 - np.linspace(1, 1 / NUM_STEPS, steps + 1))[::-1][:-1]
        return _flow_levels(shifted(t, diffusion.flow_shift(latent_pixels)), whole_times=True)
    # diffusers rounds these times, but for a cosine, whose fractions it cuts off.
    cut = np.trunc if diffusion.config.schedule == "cosine" else np.round
    return _multistep_levels(diffusion, steps, spacing, latent_pixels, options, whole=cut)


def unipc_levels(
    diffusion: Diffusion,
    steps: int,
    spacing: Spacing | None = None,
    latent_pixels: int | None = None,
    options: SamplerOptions = DEFAULT,
) -> Levels:
    """The levels of UniPC: as `dpmpp_levels`, but on a flow from just below 1."""
    _check_steps(steps)
    if diffusion.config.is_flow:
        least = {"linspace": 1 / NUM_STEPS, "trailing": 0.0}[_flow_spacing(spacing)]
        t = shifted(np.linspace(1, least, steps + 1)[:-1], diffusion.flow_shift(latent_pixels))
        return _flow_levels(np.minimum(t, 1 - FLOW_MARGIN), whole_times=True)
    return _multistep_levels(diffusion, steps, spacing, latent_pixels, options, whole=np.round)


def flow_levels(
    diffusion: Diffusion,
    steps: int,
    spacing: Spacing | None = None,
    latent_pixels: int | None = None,
    options: SamplerOptions = DEFAULT,
) -> Levels:
    """`euler_levels` of a flow. Raises `ConfigError` for another process."""
    if not diffusion.config.is_flow:
        raise ConfigError(f"prediction = {diffusion.config.prediction!r} with a sampler of flows: use euler or heun")
    return euler_levels(diffusion, steps, spacing, latent_pixels, options)


def plms_levels(
    diffusion: Diffusion,
    steps: int,
    spacing: Spacing | None = None,
    latent_pixels: int | None = None,
    options: SamplerOptions = DEFAULT,
) -> Levels:
    """`ddim_levels` of processes that begin with some signal, as the noise alone doesn't tell x₀ otherwise.

    Raises `ConfigError` for a flow and for zero-terminal SNR.
    """
    if diffusion.config.is_flow or diffusion.config.zero_terminal_snr:
        what = "a flow" if diffusion.config.is_flow else "zero_terminal_snr"
        raise ConfigError(f"plms with {what}: it needs signal at the first step, use dpmpp_2m or ddim")
    return ddim_levels(diffusion, steps, spacing, latent_pixels, options)


# -- times -------------------------------------------------------------------------------------------------------------


def _whole_step_levels(
    diffusion: Diffusion,
    steps: int,
    spacing: Spacing | None,
    latent_pixels: int | None,
    options: SamplerOptions,
    *,
    ends_noisy: bool | None,
) -> Levels:
    if not diffusion.config.is_discrete:
        return euler_levels(diffusion, steps, spacing, latent_pixels, options)
    _check_steps(steps)
    spacing = spacing or ("trailing" if diffusion.config.zero_terminal_snr else "leading")
    if spacing == "karras":
        raise ConfigError("spacing = 'karras' with whole steps: take euler, heun, dpmpp_2m, dpmpp_2m_sde or unipc")
    times = _times(diffusion, steps, spacing, options, points=steps).round()
    alphas_cumprod = diffusion.alphas_cumprod.double().numpy()
    last = alphas_cumprod[0] if (spacing == "leading" if ends_noisy is None else ends_noisy) else 1.0
    alphas_squared = np.append(alphas_cumprod[times.astype(np.int64)], last)
    return _levels(times, np.sqrt(alphas_squared), np.sqrt(1 - alphas_squared))


def _multistep_levels(
    diffusion: Diffusion,
    steps: int,
    spacing: Spacing | None,
    latent_pixels: int | None,
    options: SamplerOptions,
    *,
    whole: Callable[[Array], Array],
) -> Levels:
    if diffusion.config.is_edm:
        return _edm_levels(diffusion, steps, spacing)
    if diffusion.config.is_flow:
        t = shifted(np.linspace(1, 0, steps + 1)[:-1], diffusion.flow_shift(latent_pixels))
        return _flow_levels(t, whole_times=True)
    spacing = spacing or "linspace"
    if spacing == "karras":
        return _karras_levels(diffusion, steps, options, whole=whole)
    return _discrete_levels(diffusion, _times(diffusion, steps, spacing, options, points=steps + 1).round())


def _times(diffusion: Diffusion, steps: int, spacing: Spacing, options: SamplerOptions, *, points: int) -> Array:
    """The first `steps` of `points` times that go down the discrete process.

    Raises `ConfigError` for `leading` with zero-terminal SNR, unless a folder asks for it, and where it would go beyond
    the last step.
    """
    _check_spacing(spacing)
    if spacing == "trailing":
        # Rounding may give diffusers one time too many, below the first.
        return np.arange(NUM_STEPS, 0, -NUM_STEPS / steps)[:steps].round() - 1
    if spacing == "linspace":
        return np.linspace(0.0, NUM_STEPS - 1, points)[::-1][:steps] if points > 1 else np.array([NUM_STEPS - 1.0])
    if diffusion.config.zero_terminal_snr and options.leading_from is None:
        raise ConfigError(
            "spacing = 'leading' with zero_terminal_snr: it leaves out the last step, the only one of noise alone;"
            " use 'trailing'"
        )
    first = 1 if options.leading_from is None else options.leading_from
    times = np.arange(points)[::-1][:steps] * (NUM_STEPS // points) + float(first)
    if times[0] >= NUM_STEPS:
        raise ConfigError(f"steps = {steps} with spacing = 'leading': goes beyond step {NUM_STEPS - 1}, take fewer")
    return times


def karras_sigmas(sigma_min: float, sigma_max: float, rho: float, steps: int) -> Array:
    """Noise from σ_max to σ_min, evenly in σ^(1/ρ) (Karras et al. 2022, eq. 5), [steps]."""
    roots = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps)
    sigmas: Array = roots**rho
    return sigmas


# -- levels at times ---------------------------------------------------------------------------------------------------


def _discrete_levels(diffusion: Diffusion, times: Array, *, starts_scaled: bool = False) -> Levels:
    """Levels at fractional `times`: σ/α is interpolated linearly. If `starts_scaled`, the noise at the start is σ/α's
    alone, without the unit of the data."""
    ratios = np.interp(times, np.arange(NUM_STEPS), _ratios(diffusion))
    return _ratio_levels(times, ratios, starts_scaled=starts_scaled)


def _karras_levels(
    diffusion: Diffusion,
    steps: int,
    options: SamplerOptions,
    *,
    within: Array | None = None,
    whole: Callable[[Array], Array] | None = None,
) -> Levels:
    """The discrete process's σ/α, spaced as EDM's, between those of the first and last time of `within`, or of the
    process; their times are made whole, or stay fractional."""
    known = _ratios(diffusion)
    first, last = known[-1], known[0]
    if within is not None:
        first, last = np.interp(within[[0, -1]], np.arange(NUM_STEPS), known)
    sigma_min, sigma_max = (
        float(of_times) if chosen is None else chosen
        for chosen, of_times in ((options.sigma_min, last), (options.sigma_max, first))
    )
    ratios = karras_sigmas(sigma_min, sigma_max, RHO, steps)
    times = np.interp(np.log(ratios), np.log(known), np.arange(NUM_STEPS))
    starts_scaled = within is not None and options.karras_within != "leading"
    return _ratio_levels(times if whole is None else whole(times), ratios, starts_scaled=starts_scaled)


def _ratios(diffusion: Diffusion) -> NDArray[np.float32]:
    alphas_cumprod = diffusion.alphas_cumprod.numpy()
    if diffusion.config.zero_terminal_snr:
        alphas_cumprod = np.append(alphas_cumprod[:-1], np.float32(LEAST_ALPHAS_CUMPROD))
    ratios: NDArray[np.float32] = ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5
    return ratios


def _ratio_levels(times: Array, ratios: Array, *, starts_scaled: bool) -> Levels:
    ratios = np.append(ratios, 0).astype(np.float32).astype(np.float64)
    alphas = 1 / np.sqrt(ratios**2 + 1)
    sigmas = ratios * alphas
    return _levels(times, alphas, sigmas, noise_scale=float(sigmas[0]) if starts_scaled else 1.0)


def _flow_levels(t: Array, *, whole_times: bool) -> Levels:
    times = t * NUM_STEPS
    # Rounded as diffusers does: 1 − σ of the first level is small, and its logarithm shows the difference.
    sigmas = np.append(t, 0).astype(np.float32).astype(np.float64)
    return _levels(np.trunc(times) if whole_times else times, 1 - sigmas, sigmas, straight=True)


def _edm_levels(diffusion: Diffusion, steps: int, spacing: Spacing | None) -> Levels:
    if spacing is not None and spacing != "karras":
        _check_spacing(spacing)
        raise ConfigError(f"spacing = {spacing!r} with prediction = 'edm': only 'karras' goes by noise")
    config = diffusion.config
    sigmas = karras_sigmas(config.sigma_min, config.sigma_max, config.rho, steps)
    return _levels(
        np.log(sigmas) / 4,
        np.ones(steps + 1),
        np.append(sigmas, 0),
        noise_scale=math.hypot(config.sigma_max, 1.0),  # of noise and data, as diffusers has it
        progress=np.linspace(0, 1, steps + 1),
    )


def _levels(
    times: Array,
    alphas: Array,
    sigmas: Array,
    *,
    noise_scale: float = 1.0,
    straight: bool = False,
    progress: Array | None = None,
) -> Levels:
    times = np.append(times, 0.0)
    progress = 1 - times / NUM_STEPS if progress is None else progress
    each = zip(times.tolist(), alphas.tolist(), sigmas.tolist(), progress.tolist(), strict=True)
    return Levels(tuple(Level(*values) for values in each), noise_scale, straight)


def _flow_spacing(spacing: Spacing | None) -> Spacing:
    spacing = spacing or "linspace"
    _check_spacing(spacing)
    if spacing not in ("linspace", "trailing"):
        why = (
            "it leaves out t = 1, the only time of noise alone" if spacing == "leading" else "a flow's noise ends at 1"
        )
        raise ConfigError(f"spacing = {spacing!r} with prediction = 'flow': {why}; use 'linspace' or 'trailing'")
    return spacing


def _check_spacing(spacing: str) -> None:
    if spacing not in get_args(Spacing):
        raise ConfigError(f"spacing = {spacing!r}: must be one of {', '.join(get_args(Spacing))}")


def _check_steps(steps: int) -> None:
    if not 1 <= steps < NUM_STEPS:
        raise ConfigError(f"steps = {steps}: must be from 1 to {NUM_STEPS - 1}")
