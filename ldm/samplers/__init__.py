"""Samplers by name: a solver (`solvers`) with the noise levels (`levels`) that it is usually run on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from torch import Tensor

from ldm.errors import ConfigError
from ldm.samplers.level import Level, Levels
from ldm.samplers.levels import (
    LevelsOf,
    ddim_levels,
    ddpm_levels,
    dpmpp_levels,
    euler_levels,
    flow_levels,
    plms_levels,
    unipc_levels,
)
from ldm.samplers.options import SamplerOptions, Spacing
from ldm.samplers.solvers import (
    After,
    Denoise,
    Draw,
    ddim,
    dpmpp_2m,
    dpmpp_2m_sde,
    dynamic_threshold,
    heun,
    no_noise,
    plms,
    unchanged,
    unipc,
)

__all__ = [
    "SAMPLERS",
    "After",
    "Denoise",
    "Draw",
    "Level",
    "Levels",
    "Sampler",
    "SamplerOptions",
    "Solve",
    "Spacing",
    "ddim_levels",
    "dpmpp_levels",
    "dynamic_threshold",
    "euler_levels",
    "get_sampler",
    "no_noise",
    "register_sampler",
    "unchanged",
]


class Solve(Protocol):
    """See `ldm.samplers.solvers`."""

    def __call__(
        self, denoise: Denoise, x: Tensor, levels: Levels, draw: Draw = ..., after: After = ..., /
    ) -> Tensor: ...


@dataclass(frozen=True)
class Sampler:
    """A solver with the levels it is usually run on."""

    levels_of: LevelsOf
    """Levels of a run; see `ldm.samplers.levels`."""
    solve: Solve
    """(denoise, x at the first level [B, ...], levels, draw, after) to x at the last."""
    calls: Callable[[Levels], int] = lambda levels: levels.steps
    """How often the network is called."""
    takes_eta: bool = False


def get_sampler(name: str, eta: float | None = None, options: SamplerOptions | None = None) -> Sampler:
    """The sampler of that name; `eta` from 0 to 1 is the part of the noise that it draws anew (Song et al. 2021, eq.
    16), None its own choice; `options` are finer choices, None its own.

    Raises `ConfigError` if there is none, or it takes no `eta` or not this.
    """
    if name not in SAMPLERS:
        raise ConfigError(f"sampler {name!r} is unknown: choose one of {', '.join(SAMPLERS)}")
    sampler = SAMPLERS[name]
    if options is not None:
        levels_of = partial(sampler.levels_of, options=options)
        sampler = replace(sampler, levels_of=levels_of, solve=_solve(name, options))
    if eta is None:
        return sampler
    if not sampler.takes_eta:
        takers = ", ".join(name for name, other in SAMPLERS.items() if other.takes_eta)
        raise ConfigError(f"eta = {eta} with sampler {name!r}: leave it out, only {takers} take it")
    if not 0 <= eta <= 1:
        raise ConfigError(f"eta = {eta}: must be from 0 (no noise is drawn) to 1 (as DDPM)")
    return replace(sampler, solve=partial(ddim, eta=eta))


def _solve(name: str, options: SamplerOptions) -> Solve:
    if name == "plms" and options.mixes_velocities:
        return partial(plms, mixes_velocities=True)
    # DPM-Solver++ of first order is DDIM, and with noise its ancestral form (Lu et al. 2022, section 6.1).
    first_order: dict[str, Solve] = {
        "dpmpp_2m": ddim,
        "dpmpp_2m_sde": partial(ddim, eta=1.0),
        "unipc": partial(unipc, most=1),
    }
    if options.order == 1 and name in first_order:
        return first_order[name]
    return SAMPLERS[name].solve


def _heun_calls(levels: Levels) -> int:
    return 2 * levels.steps - (levels.levels[-1].sigma == 0)


def _plms_calls(levels: Levels) -> int:
    return levels.steps + (levels.steps > 1)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(ddpm_levels, partial(ddim, eta=1.0)),
    "ddim": Sampler(ddim_levels, ddim, takes_eta=True),
    "plms": Sampler(plms_levels, plms, _plms_calls),
    "euler": Sampler(euler_levels, ddim),
    "euler_ancestral": Sampler(euler_levels, partial(ddim, eta=1.0), takes_eta=True),
    "heun": Sampler(euler_levels, heun, _heun_calls),
    "dpmpp_2m": Sampler(dpmpp_levels, dpmpp_2m),
    "dpmpp_2m_sde": Sampler(dpmpp_levels, dpmpp_2m_sde),
    "unipc": Sampler(unipc_levels, unipc),
    "flow_euler": Sampler(flow_levels, ddim),
    "flow_heun": Sampler(flow_levels, heun, _heun_calls),
}
"""Samplers by the names that commands and recipes use. `register_sampler` adds to them."""


def register_sampler(name: str, sampler: Sampler) -> None:
    """Make a sampler known by a name. Every process that reads the name has to register it.

    Raises `ConfigError` for a name that is there already, or is no name, and for what is no `Sampler`.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ConfigError(f"sampler {name!r}: must be lower-case letters, digits and _, beginning with a letter")
    if name in SAMPLERS:
        raise ConfigError(f"sampler {name!r} is registered already: choose another name")
    if not isinstance(sampler, Sampler):
        raise ConfigError(f"sampler {name!r} is a {type(sampler).__name__}: must be a Sampler")
    SAMPLERS[name] = sampler
