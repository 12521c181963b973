"""What can be said of a run beside its sampler and the number of steps: the spacing, and finer choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Spacing = Literal["leading", "trailing", "linspace", "karras"]
"""How a run's times are spread over the process (Lin et al. 2023, table 2):

- `leading`: multiples of 1000 // steps from 1 on, which leaves out the last step;
- `trailing`: multiples of 1000 / steps down from the last step;
- `linspace`: evenly from the last step to the first;
- `karras`: by noise, evenly in (σ/α)^(1/ρ) (Karras et al. 2022, eq. 5).

A flow has `trailing` and `linspace`, EDM `karras`.
"""


@dataclass(frozen=True)
class SamplerOptions:
    """Finer choices that a folder's scheduler_config.json makes for its own sampler, by its keys; the defaults are what
    the samplers do of themselves. A sampler takes no notice of what is not about it."""

    leading_from: int | None = None
    """`steps_offset`: the first of the `leading` times, 0 or 1. None: 1, and `leading` is refused where the last step
    is noise alone, as it leaves that out."""
    ends_noisy: bool | None = None
    """`set_alpha_to_one`, but the other way round: ddim and plms end at step 0's noise, and not without noise. None:
    `leading` alone does."""
    karras_within: Spacing = "linspace"
    """`timestep_spacing` beside `use_karras_sigmas`: euler and heun go from the noise of that spacing's first time to
    that of its last."""
    sigma_min: float | None = None
    """`sigma_min`, the last σ/α of `karras`. None: that of `karras_within`, or the process's first step."""
    sigma_max: float | None = None
    """`sigma_max`, the first σ/α of `karras`."""
    order: int = 2
    """`solver_order` of dpmpp_2m, dpmpp_2m_sde and unipc, 1 or 2."""
    mixes_velocities: bool = False
    """plms combines v and not the noise, as diffusers does with networks that predict v."""
