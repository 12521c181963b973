"""Guidance: away from a worse prediction, towards a better one (classifier-free guidance: Ho & Salimans 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.errors import ConfigError, InputError

Extra = Tensor | Sequence[Tensor] | None
"""Channels [B, E, H, W] that go with the latents, or one such for the empty condition and each of the others."""


@dataclass(frozen=True)
class Guidance:
    """How much better than without a condition a prediction is to be.

    Raises `ConfigError` for numbers out of their range, and for what can't be had together.
    """

    scale: float | tuple[float, ...] = 1.0
    """s of u + s·(c − u), where c is the prediction with the condition and u without (Ho & Salimans 2022, eq. 6 with
    s = 1 + w): 1 is c. One for each of several conditions: u + Σ sᵢ·(cᵢ − u) (Liu et al. 2022, "Composable
    Diffusion"); only then may some be negative. InstructPix2Pix (Brooks et al. 2023, eq. 3), with scales s_I for the
    image and s_T for the text, is (s_I − s_T, s_T) for the conditions (image; image and text)."""
    rescale: float = 0.0
    """Share, from 0 (not) to 1, by which the prediction's standard deviation is brought back, sample by sample, to c's
    (Lin et al. 2023, section 3.4: 0.7)."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guide only where the share of noise σ/(α + σ), a flow's time, is in it, and take c elsewhere (Kynkäänniemi et al.
    2024); at noise σ of EDM, σ/(1 + σ)."""
    weak: nn.Module | None = None
    """A smaller or less trained network, which then gives u, with the same condition (Karras et al. 2024,
    "autoguidance"); the empty condition is not used."""

    def __post_init__(self) -> None:
        if isinstance(self.scale, tuple):
            if not self.scale or not all(abs(scale) < float("inf") for scale in self.scale):
                raise ConfigError(f"guidance_scale = {self.scale}: must be numbers, one for each condition")
            if self.weak is not None or self.interval != (0.0, 1.0):
                raise ConfigError("several guidance scales with a weak network or an interval: take one scale")
        elif not 0 <= self.scale < float("inf"):
            raise ConfigError(f"guidance_scale = {self.scale}: must be 0 (no prompt), 1 (no guidance) or above")
        if not 0 <= self.rescale <= 1:
            raise ConfigError(f"guidance rescale = {self.rescale}: must be from 0 (none) to 1")
        if not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ConfigError(f"guidance interval = {self.interval}: must be two rising shares of noise, 0 to 1")

    def guides(self, noise_share: float) -> bool:
        """Whether there is more to do at this share of noise than predict with the condition."""
        return self.scale != 1 and self.interval[0] <= noise_share <= self.interval[1]


class Guided:
    """A network under guidance, of one condition or of several: made once, and called at every step.

    `empty` is what to go away from: the empty prompt, or negative ones. It may be None where nothing asks for it. All
    conditions are of as many rows as the latents will have. What doesn't change from step to step is computed once.

    Raises `ConfigError` for a scale out of range, or another number of scales than of conditions; `InputError` for
    another number of extra channels than of conditions.
    """

    def __init__(
        self,
        unet: nn.Module,
        conditioning: Conditioning | Sequence[Conditioning],
        empty: Conditioning | None,
        guidance: Guidance | float,
        *,
        extra_BEHW: Extra = None,
    ) -> None:
        self.guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
        self.conditions = [conditioning] if isinstance(conditioning, Conditioning) else list(conditioning)
        self.empty = empty
        scale = self.guidance.scale
        self.scales = scale if isinstance(scale, tuple) else (scale,)
        if len(self.scales) != len(self.conditions):
            raise ConfigError(
                f"{len(self.scales)} guidance scales and {len(self.conditions)} conditions: give one for each"
            )
        self.extras = _extras(extra_BEHW, len(self.conditions))
        self._unet = unet

    def __call__(self, latents_BCHW: Tensor, timesteps_B: Tensor, *, noise_share: float = 0.5) -> Tensor:
        """The guided prediction [B, C, H, W], float32, from one pass over all conditions (and one more of a weak
        network). A scale of 1, and noise outside the interval, take one pass with the condition alone.

        Raises `InputError` if `empty` is absent and asked for, or conditions are of another number of rows.
        """
        guidance = self.guidance
        guides = guidance.guides(noise_share)
        away = [self.empty] if guides and guidance.weak is None and self.empty is not None else []
        for condition in (*self.conditions, *away):
            if len(condition) != len(latents_BCHW):
                raise InputError(f"{len(condition)} rows of a condition and {len(latents_BCHW)} latents: must be equal")
        if not guides:
            return self._alone(self._unet, latents_BCHW, timesteps_B)
        if guidance.weak is not None:
            within = [self._alone(self._unet, latents_BCHW, timesteps_B)]
            without = self._alone(guidance.weak, latents_BCHW, timesteps_B)
        else:
            inputs = torch.cat([_joined(latents_BCHW, extra) for extra in self.extras])
            times = timesteps_B.repeat(len(self.extras))
            without, *within = predict(self._unet, inputs, times, self._all).float().chunk(len(self.extras))
        mixed = without
        for scale, prediction in zip(self.scales, within, strict=True):
            mixed = mixed + scale * (prediction - without)
        return rescaled(mixed, within[-1], guidance.rescale)

    @cached_property
    def _all(self) -> Conditioning:
        if self.empty is None:
            raise InputError("guidance without an empty condition: give one, or a scale of 1")
        return Conditioning.concatenate([self.empty, *self.conditions])

    def _alone(self, network: nn.Module, latents_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """A network's prediction under the first condition, float32."""
        return predict(network, _joined(latents_BCHW, self.extras[1]), timesteps_B, self.conditions[0]).float()


def predict(unet: nn.Module, latents_BCHW: Tensor, timesteps_B: Tensor, conditioning: Conditioning) -> Tensor:
    """The network's prediction [B, C, H, W]: spreads a condition over its arguments, of which it is given only those
    that there are."""
    parts = {
        "pooled_BP": conditioning.pooled,
        "sizes_BS": conditioning.sizes,
        "noise_level_B": conditioning.noise_level,
    }
    given = {name: part for name, part in parts.items() if part is not None}
    prediction: Tensor = unet(latents_BCHW, timesteps_B, conditioning.context, conditioning.mask, **given)
    return prediction


def rescaled(guided_BCHW: Tensor, conditional_BCHW: Tensor, share: float) -> Tensor:
    """The guided prediction, `share` of it with the standard deviation of the conditional one, sample by sample (Lin et
    al. 2023, section 3.4)."""
    if share == 0:
        return guided_BCHW
    deviations = [part.flatten(1).std(dim=1).view(-1, 1, 1, 1) for part in (conditional_BCHW, guided_BCHW)]
    return guided_BCHW * (share * deviations[0] / deviations[1] + 1 - share)


def _joined(latents_BCHW: Tensor, extra_BEHW: Tensor | None) -> Tensor:
    return latents_BCHW if extra_BEHW is None else torch.cat([latents_BCHW, extra_BEHW], dim=1)


def _extras(extra: Extra, conditions: int) -> list[Tensor | None]:
    """One for `empty` and for each condition."""
    if extra is None or isinstance(extra, Tensor):
        return [extra] * (conditions + 1)
    if len(extra) != conditions + 1:
        raise InputError(f"{len(extra)} extra channels: must be {conditions + 1}, for empty and each condition")
    return list(extra)
