"""Log-mel spectrograms in torch: sound as a picture of frequencies over time, spaced as ears hear them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.errors import ConfigError, InputError

MelScale = Literal["htk", "slaney"]

HTK_BREAK_HZ, HTK_FACTOR = 700.0, 2595.0
SLANEY_BREAK_HZ, SLANEY_HZ_A_MEL = 1000.0, 200 / 3
SLANEY_BREAK_MEL = SLANEY_BREAK_HZ / SLANEY_HZ_A_MEL
SLANEY_LOG_STEP = math.log(6.4) / 27
"""Step of a mel in the logarithm of the frequency, as the Auditory Toolbox (Slaney 1998) has it: linear to 1,000 Hz,
then 27 mels to 6,400 Hz, evenly in the logarithm."""
FLOOR = 1e-10
"""Least power before the logarithm: silence is -10."""


@dataclass(frozen=True)
class MelConfig:
    """A log-mel spectrogram. Times are in samples."""

    sample_rate: int = 16000
    """Hz."""
    mels: int = 64
    window: int = 400
    """Samples of a frame, and of its Fourier transform."""
    hop: int = 160
    """Samples from frame to frame."""
    low_hz: float = 0.0
    high_hz: float = 8000.0
    scale: MelScale = "htk"

    def __post_init__(self) -> None:
        if min(self.sample_rate, self.mels, self.hop) < 1 or self.window < 2:
            raise ConfigError(
                f"sample_rate = {self.sample_rate}, mels = {self.mels}, hop = {self.hop}, window = {self.window}: "
                "must be 1 or more, and the window 2"
            )
        if self.scale not in get_args(MelScale):
            raise ConfigError(f"scale = {self.scale!r}: must be one of {', '.join(get_args(MelScale))}")
        if not 0 <= self.low_hz < self.high_hz <= self.sample_rate / 2:
            raise ConfigError(
                f"low_hz = {self.low_hz}, high_hz = {self.high_hz}: must be 0 <= low_hz < high_hz <= "
                f"{self.sample_rate / 2}, half the sample rate"
            )
        if bool((mel_filters(self).amax(dim=0) == 0).any()):
            raise ConfigError(f"mels = {self.mels} with window = {self.window}: some mels hold no frequency; use fewer")

    def frames(self, samples: int) -> int:
        """Frames of so many samples: centred on every hop, the ends mirrored."""
        return 1 + samples // self.hop


def log_mel(waveforms_BS: Tensor, config: MelConfig) -> Tensor:
    """log₁₀ of the power in each mel, at least -10, float32 [B, mels, frames], of waveforms float32 [B, samples].

    Raises `InputError` for less than half a window of samples, which can't be mirrored at the ends.
    """
    if waveforms_BS.shape[-1] <= config.window // 2:
        raise InputError(
            f"waveforms have {waveforms_BS.shape[-1]} samples: need more than {config.window // 2}, half a window"
        )
    window = torch.hann_window(config.window, device=waveforms_BS.device)
    spectrum = torch.stft(
        waveforms_BS,
        config.window,
        config.hop,
        window=window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )
    power = spectrum.abs().square().transpose(1, 2) @ mel_filters(config).to(waveforms_BS)
    return power.clamp(min=FLOOR).log10().transpose(1, 2)


@lru_cache(maxsize=8)
def mel_filters(config: MelConfig) -> Tensor:
    """Triangular filters float32 [window // 2 + 1, mels]: each rises from its neighbour's centre to its own and falls
    to the next one's, in Hz; centres are evenly spaced in mels. Slaney's have area 1, HTK's height 1. Not to be
    written to.
    """
    ends = _to_mel(torch.tensor([config.low_hz, config.high_hz], dtype=torch.float64), config.scale)
    mels = torch.linspace(float(ends[0]), float(ends[1]), config.mels + 2, dtype=torch.float64)
    corners = _to_hz(mels, config.scale)
    bins = torch.linspace(0, config.sample_rate / 2, config.window // 2 + 1, dtype=torch.float64)
    left, centre, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (bins[:, None] - left) / (centre - left)
    falling = (right - bins[:, None]) / (right - centre)
    filters = torch.minimum(rising, falling).clamp(min=0)
    if config.scale == "slaney":
        filters = filters * 2 / (right - left)
    return filters.float()


def _to_mel(hz: Tensor, scale: MelScale) -> Tensor:
    if scale == "htk":
        return HTK_FACTOR * (1 + hz / HTK_BREAK_HZ).log10()
    above = SLANEY_BREAK_MEL + (hz.clamp(min=SLANEY_BREAK_HZ) / SLANEY_BREAK_HZ).log() / SLANEY_LOG_STEP
    return torch.where(hz < SLANEY_BREAK_HZ, hz / SLANEY_HZ_A_MEL, above)


def _to_hz(mel: Tensor, scale: MelScale) -> Tensor:
    if scale == "htk":
        return HTK_BREAK_HZ * (10 ** (mel / HTK_FACTOR) - 1)
    above = SLANEY_BREAK_HZ * ((mel - SLANEY_BREAK_MEL) * SLANEY_LOG_STEP).exp()
    return torch.where(mel < SLANEY_BREAK_MEL, mel * SLANEY_HZ_A_MEL, above)
