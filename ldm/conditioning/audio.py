"""Sound: by CLAP's frozen audio tower (Wu et al. 2023), or by a small encoder that is trained with the U-Net.

Waveforms are mono, in [-1, 1], at the encoder's own sample rate: nothing is resampled here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.conditioning.mel import MelConfig, log_mel
from ldm.conditioning.pretrained import device_of, load_pretrained, load_processor, weights_sha256
from ldm.errors import ConfigError, FolderError, InputError


@dataclass(frozen=True)
class Audio:
    """A batch of sounds of equal length."""

    waveforms: Tensor
    """Float32 [B, samples] in [-1, 1]."""
    sample_rate: int
    """Hz."""

    def __post_init__(self) -> None:
        waveforms = self.waveforms
        if waveforms.ndim != 2 or waveforms.dtype != torch.float32 or 0 in waveforms.shape:
            raise InputError(
                f"waveforms are {waveforms.dtype} {tuple(waveforms.shape)}: must be torch.float32 [batch, samples], "
                "with at least one of each"
            )
        most = float(waveforms.abs().max())
        if not most <= 1:
            raise InputError(f"waveforms reach {most:g}: must be in [-1, 1]; divide integers by their type's largest")

    def check_rate(self, wanted: int) -> None:
        """Raises `InputError` for another sample rate."""
        if self.sample_rate != wanted:
            raise InputError(f"sample rate is {self.sample_rate} Hz: this encoder needs {wanted} Hz, resample first")


# -- CLAP --------------------------------------------------------------------------------------------------------------


def load_clap(folder: Path) -> ClapEncoder:
    """The audio tower in a folder of transformers' ClapAudioModelWithProjection, or of a whole CLAP, with its
    preprocessor_config.json.

    Raises `FolderError` if files are absent or corrupt, or weights are pickles or don't fit.
    """
    extractor = load_processor(folder, "ClapFeatureExtractor")
    network = load_pretrained(folder, "ClapAudioModelWithProjection")
    fused = extractor.truncation == "fusion"
    if fused != network.config.enable_fusion:
        raise FolderError(
            f"{folder}: truncation is {extractor.truncation!r} and enable_fusion {network.config.enable_fusion}: "
            "'fusion' needs true, others false"
        )
    return ClapEncoder(network, extractor, name=folder.name)


class ClapEncoder:
    """A frozen audio tower: its projected embedding is a context of one token. The null condition is zeros."""

    def __init__(self, network: Any, extractor: Any, *, name: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.extractor = extractor
        self.name = name

    @property
    def width(self) -> int:
        return int(self.network.config.projection_dim)

    @property
    def length(self) -> int:
        return 1

    @property
    def identity(self) -> str:
        """`name@sha256:…` over the weights."""
        return f"{self.name}@sha256:{weights_sha256(self.network.state_dict())}"

    def to(self, device: torch.device | str) -> Self:
        """The same encoder, moved."""
        self.network.to(device)
        return self

    @torch.inference_mode()
    def encode(self, audio: Audio) -> Conditioning:
        """The embeddings [B, 1, width], float32. Shorter sounds are repeated and padded as the tower's were.

        Raises `InputError` for another sample rate, and for sounds longer than the tower's: it would read pieces drawn
        at random.
        """
        audio.check_rate(self.extractor.sampling_rate)
        samples, most = audio.waveforms.shape[1], self.extractor.nb_max_samples
        if samples > most:
            raise InputError(f"waveforms have {samples} samples: at most {most}, {self.extractor.max_length_s} s; cut")
        waveforms = list(audio.waveforms.cpu().numpy())
        with _numpy_undrawn():
            features = self.extractor(waveforms, sampling_rate=audio.sample_rate, return_tensors="pt")["input_features"]
        longer = torch.zeros(len(features), 1, dtype=torch.bool)
        device = device_of(self.network)
        embedded = self.network(features.float().to(device), is_longer=longer.to(device)).audio_embeds
        with torch.inference_mode(False):
            return Conditioning(embedded.float()[:, None].clone())

    def null(self, count: int) -> Conditioning:
        """`count` times zeros, sharing memory."""
        return Conditioning(torch.zeros(1, 1, self.width, device=device_of(self.network))).expand(count)


@contextmanager
def _numpy_undrawn() -> Iterator[None]:
    """Leave NumPy's global generator as it was: the extractor draws the place of a long sound, which is not used."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)


# -- trained with the U-Net --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AudioEncoderConfig:
    """Shape of an audio encoder."""

    samples: int = 16000
    """Length in samples of every sound; shorter ones are filled up with silence."""
    mel: MelConfig = field(default_factory=MelConfig)
    width: int = 128
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        if self.samples <= self.mel.window // 2:
            raise ConfigError(f"samples = {self.samples}: must be more than {self.mel.window // 2}, half a window")
        if self.layers < 0 or self.heads < 1 or self.width % (2 * self.heads):
            raise ConfigError(
                f"width = {self.width}, heads = {self.heads}, layers = {self.layers}: the width must be a multiple of "
                "twice the heads, layers 0 or more"
            )

    @property
    def length(self) -> int:
        """Tokens of a sound: a quarter of its frames."""
        return math.ceil(math.ceil(self.mel.frames(self.samples) / 2) / 2)


class AudioEncoder(nn.Module):
    """A log-mel spectrogram, two convolutions that each halve its frames, then a transformer: the shape of Whisper's
    encoder (Radford et al. 2022, section 2.2), small. The null condition is a learned token, repeated.
    """

    def __init__(self, config: AudioEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.conv1 = nn.Conv1d(config.mel.mels, config.width, 3, stride=2, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, 3, stride=2, padding=1)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width,
                config.heads,
                4 * config.width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(config.layers)
        )
        self.norm_out = nn.LayerNorm(config.width)
        self.silence = nn.Parameter(torch.zeros(config.width))

    @property
    def width(self) -> int:
        return self.config.width

    @property
    def length(self) -> int:
        return self.config.length

    @property
    def identity(self) -> str:
        """`audio@sha256:…` over configuration and weights, as they are now."""
        shape = ",".join(f"{key}={value}" for key, value in sorted(asdict(self.config).items()))
        return f"audio({shape})@sha256:{weights_sha256(self.state_dict())}"

    def forward(self, waveforms_BS: Tensor) -> Tensor:
        """Tokens [B, length, width] of waveforms float32 [B, samples] in [-1, 1]."""
        filled = F.pad(waveforms_BS, (0, self.config.samples - waveforms_BS.shape[1]))
        # From about [-10, 2] to about [-1, 1].
        spectrum = log_mel(filled, self.config.mel) / 5 + 1
        hidden = F.gelu(self.conv1(spectrum.to(self.conv1.weight.dtype)))
        hidden = F.gelu(self.conv2(hidden)).transpose(1, 2)
        hidden = hidden + _positions(self.length, self.width).to(hidden)
        for layer in self.layers:
            hidden = layer(hidden)
        tokens: Tensor = self.norm_out(hidden)
        return tokens

    def encode(self, audio: Audio) -> Conditioning:
        """The tokens of sounds, with gradients. Raises `InputError` for another sample rate, or longer sounds than the
        encoder's."""
        audio.check_rate(self.config.mel.sample_rate)
        if audio.waveforms.shape[1] > self.config.samples:
            raise InputError(
                f"waveforms have {audio.waveforms.shape[1]} samples: this encoder takes {self.config.samples}; cut"
            )
        return Conditioning(self(audio.waveforms.to(self.silence.device)))

    def null(self, count: int) -> Conditioning:
        """`count` times the learned null condition, with gradients."""
        return Conditioning(self.silence.expand(1, self.length, self.width)).expand(count)


def _positions(length: int, width: int) -> Tensor:
    """Sinusoids [length, width] (Vaswani et al. 2017, section 3.5)."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
