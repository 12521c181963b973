"""Solvers of the reverse process: small pure functions, each named after its paper.

`solve(denoise, x, levels, draw, after)` takes x [B, ...], float32, from the first of `levels` to the last. It knows the
network only as `denoise(x, level)`: x₀ for a noised x. `draw()` is standard normal noise like x, for those that add
some; `after(x, level)` changes x after each step, as inpainting does, and the next step goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ldm.samplers.level import Level, Levels

Denoise = Callable[[Tensor, Level], Tensor]
Draw = Callable[[], Tensor]
After = Callable[[Tensor, Level], Tensor]


def unchanged(x: Tensor, _level: Level) -> Tensor:
    """The `after` that leaves x as it is."""
    return x


def no_noise() -> Tensor:
    """The `draw` of solvers that add none."""
    raise AssertionError("this solver was to draw no noise")


# -- one step ----------------------------------------------------------------------------------------------------------


def ddim(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    draw: Draw = no_noise,
    after: After = unchanged,
    *,
    eta: float = 0.0,
) -> Tensor:
    """Song et al. 2021, eq. 12: keep the noise that x implies but for a part that is drawn anew, and change its share.

    With η = 0 this is Euler's method (ibid., eq. 14; Karras et al. 2022, algorithm 1 without churn) on x/α over σ/α,
    and on a flow along its velocity. With η = 1 it is DDPM's ancestral sampling (Ho et al. 2020, eq. 7, with the lower
    variance) and "Euler ancestral". These samplers differ in their levels alone.
    """
    for now, then in pairwise(levels.levels):
        x0 = denoise(x, now)
        epsilon = (x - now.alpha * x0) / now.sigma
        fresh = eta * posterior_deviation(now, then)
        x = then.alpha * x0 + math.sqrt(max(then.sigma**2 - fresh**2, 0)) * epsilon
        if fresh > 0:
            x = x + fresh * draw()
        x = after(x, then)
    return x


def posterior_deviation(now: Level, then: Level) -> float:
    """Standard deviation of x at the lower level `then`, given x at `now` and x₀ (Ho et al. 2020, eq. 7, for any α, σ:
    Kingma et al. 2021, appendix A)."""
    between = now.sigma**2 - (now.alpha / then.alpha * then.sigma) ** 2
    return math.sqrt(max(between, 0)) * then.sigma / now.sigma


def heun(denoise: Denoise, x: Tensor, levels: Levels, _draw: Draw = no_noise, after: After = unchanged) -> Tensor:
    """Karras et al. 2022, algorithm 1 (no churn): the slope is the mean of those before and after an Euler step; the
    step to σ = 0 is Euler's.

    Its line is y = x/c over s = σ/c, with slope (y − x₀)/s; c = α, or 1 on a flow, whose paths are straight in x.
    """
    for now, then in pairwise(levels.levels):
        c_now, c_then = (1.0, 1.0) if levels.straight else (now.alpha, then.alpha)
        s_now, s_then = now.sigma / c_now, then.sigma / c_then
        y = x / c_now
        slope = (y - denoise(x, now)) / s_now
        y_then = y + (s_then - s_now) * slope
        if then.sigma > 0:
            slope_then = (y_then - denoise(c_then * y_then, then)) / s_then
            y_then = y + (s_then - s_now) * (slope + slope_then) / 2
        x = after(c_then * y_then, then)
    return x


# -- several steps -----------------------------------------------------------------------------------------------------


def plms(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    _draw: Draw = no_noise,
    after: After = unchanged,
    *,
    mixes_velocities: bool = False,
) -> Tensor:
    """Pseudo linear multistep, Liu et al. 2022, with `ddim` as transfer: up to four last noises are combined, or v's.

    The first step is made twice, the second time with the mean of the noise before and after it. Where `after` changed
    x, the noises before are of another x, and the present one is taken for them.
    """
    implied = _implied_velocity if mixes_velocities else _implied_noise
    noise_of = _noise_of_velocity if mixes_velocities else _noise_of_noise
    before: list[Tensor] = []
    kept = torch.ones_like(x, dtype=torch.bool)
    for index, (now, then) in enumerate(pairwise(levels.levels)):
        slope = implied(denoise, x, now)
        if index == 0:
            trial = _transfer(x, noise_of(x, slope, now), now, then)
            mixed = (slope + implied(denoise, trial, then)) / 2 if levels.steps > 1 else slope
        else:
            before = [torch.where(kept, earlier, slope) for earlier in before]
            mixed = _adams_bashforth([slope, *before])
        stepped = _transfer(x, noise_of(x, mixed, now), now, then)
        x = after(stepped, then)
        kept = x == stepped
        before = [slope, *before[:2]]
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, levels: Levels, _draw: Draw = no_noise, after: After = unchanged) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: of second order by the last two x₀.

    The first step, and one to σ = 0, are of first order.
    """
    before: tuple[Level, Tensor] | None = None
    for now, then in pairwise(levels.levels):
        x0 = denoise(x, now)
        mixed = _extrapolated(x0, before, now, then)
        h = then.log_snr - now.log_snr
        x = after(then.sigma / now.sigma * x - then.alpha * math.expm1(-h) * mixed, then)
        before = (now, x0)
    return x


def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, levels: Levels, draw: Draw = no_noise, after: After = unchanged
) -> Tensor:
    """SDE-DPM-Solver++(2M), Lu et al. 2022: `dpmpp_2m` of the process that adds noise as it goes."""
    before: tuple[Level, Tensor] | None = None
    for now, then in pairwise(levels.levels):
        x0 = denoise(x, now)
        mixed = _extrapolated(x0, before, now, then)
        h = then.log_snr - now.log_snr
        share = -math.expm1(-2 * h)
        x = then.sigma / now.sigma * math.exp(-h) * x + then.alpha * share * mixed
        if then.sigma > 0:
            x = x + then.sigma * math.sqrt(share) * draw()
        x = after(x, then)
        before = (now, x0)
    return x


def unipc(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    _draw: Draw = no_noise,
    after: After = unchanged,
    *,
    most: int = 2,
) -> Tensor:
    """UniPC of order `most`, 1 or 2, for x₀ with B₂(h), Zhao et al. 2023, section 3: predict x, and correct it with the
    x₀ found there, at no further call of the network.

    The first step and the last are of first order. What `after` changed in x is not corrected.
    """
    known: list[tuple[Level, Tensor]] = []  # the last two levels and their x₀, latest first
    corrected, predicted, order = x, x, 1
    for index, (now, then) in enumerate(pairwise(levels.levels)):
        x0 = denoise(x, now)
        if index > 0:
            corrected = torch.where(x == predicted, _unified_step(corrected, known[:order], now, x0), x)
        known = [(now, x0), *known[:1]]
        order = 1 if index == 0 or index == levels.steps - 1 else most
        predicted = _unified_step(corrected, known[:order], then)
        x = after(predicted, then)
    return x


def _implied_noise(denoise: Denoise, x: Tensor, level: Level) -> Tensor:
    return (x - level.alpha * denoise(x, level)) / level.sigma


def _implied_velocity(denoise: Denoise, x: Tensor, level: Level) -> Tensor:
    return (level.alpha * x - denoise(x, level)) / level.sigma


def _noise_of_noise(_x: Tensor, epsilon: Tensor, _level: Level) -> Tensor:
    return epsilon


def _noise_of_velocity(x: Tensor, velocity: Tensor, level: Level) -> Tensor:
    return level.alpha * velocity + level.sigma * x


def _transfer(x: Tensor, epsilon: Tensor, now: Level, then: Level) -> Tensor:
    """x at the level `then` with the same noise."""
    return then.alpha / now.alpha * (x - now.sigma * epsilon) + then.sigma * epsilon


def _adams_bashforth(latest_first: list[Tensor]) -> Tensor:
    """The next slope by the last two to four."""
    weights = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    terms = zip(weights[len(latest_first)], latest_first, strict=True)
    return torch.stack([weight * slope for weight, slope in terms]).sum(dim=0)


def _extrapolated(x0: Tensor, before: tuple[Level, Tensor] | None, now: Level, then: Level) -> Tensor:
    """x₀ half a step on in λ, by the last two."""
    if before is None or then.sigma == 0:
        return x0
    r = (now.log_snr - before[0].log_snr) / (then.log_snr - now.log_snr)
    return x0 + (x0 - before[1]) / (2 * r)


def _unified_step(x: Tensor, known: list[tuple[Level, Tensor]], then: Level, x0_then: Tensor | None = None) -> Tensor:
    """x from the level of `known`'s first x₀ to `then`: UniP, or UniC if x₀ is known there too (Zhao et al. 2023,
    section 3, in its form for x₀)."""
    now, x0 = known[0]
    h = then.log_snr - now.log_snr
    b = math.expm1(-h)  # B₂(−h)
    x_then = then.sigma / now.sigma * x - then.alpha * b * x0
    slopes = [(at, (other.log_snr - now.log_snr) / h) for other, at in known[1:]]
    if x0_then is not None:
        slopes.append((x0_then, 1.0))
    for weight, (at, r) in zip(_unified_weights(h, [r for _, r in slopes]), slopes, strict=True):
        x_then = x_then - then.alpha * b * weight / r * (at - x0)
    return x_then


def _unified_weights(h: float, r: list[float]) -> list[float]:
    """Weights of one or two differences of x₀, at the fractions r of a step h in λ: a single one takes 1/2, two solve
    Σ a = g₁, Σ a·r = g₂ (Zhao et al. 2023, theorem 3.1)."""
    if len(r) < 2:
        return [0.5] * len(r)
    b = math.expm1(-h)
    phi_2 = b / -h - 1
    phi_3 = phi_2 / -h - 0.5
    g_1, g_2 = phi_2 / b, 2 * phi_3 / b
    first = (g_2 - r[1] * g_1) / (r[0] - r[1])
    return [first, g_1 - first]


def dynamic_threshold(x0: Tensor, percentile: float, limit: float = 1.0) -> Tensor:
    """x₀ [B, ...] whose values beyond a percentile of their size s > limit are cut, and all divided by s/limit, so that
    none is larger than `limit` (Saharia et al. 2022, section 2.3)."""
    sizes = torch.quantile(x0.flatten(1).abs(), percentile, dim=1).clamp(min=limit)
    sizes = sizes.view(-1, *(1,) * (x0.ndim - 1))
    return x0.clamp(-sizes, sizes) * (limit / sizes)
