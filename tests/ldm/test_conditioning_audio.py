"""Mel filters and CLAP held against transformers, and the encoder that is trained; the tower is tiny and random."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.audio_utils import mel_filter_bank

from ldm.conditioning.audio import Audio, AudioEncoder, AudioEncoderConfig, load_clap
from ldm.conditioning.mel import MelConfig, MelScale, log_mel, mel_filters
from ldm.errors import ConfigError, FolderError, InputError

RATE = 8000
MEL = MelConfig(sample_rate=RATE, mels=16, window=256, hop=80, high_hz=4000)


def tones(hz: list[float], samples: int = 4000, rate: int = RATE) -> torch.Tensor:
    times = torch.arange(samples) / rate
    return 0.5 * (2 * math.pi * torch.tensor(hz)[:, None] * times).sin()


# -- mel ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["htk", "slaney"])
def test_filters_are_those_of_transformers(scale: MelScale) -> None:
    config = MelConfig(sample_rate=48000, mels=64, window=1024, hop=480, low_hz=50, high_hz=14000, scale=scale)
    theirs = mel_filter_bank(513, 64, 50, 14000, 48000, norm="slaney" if scale == "slaney" else None, mel_scale=scale)
    torch.testing.assert_close(mel_filters(config), torch.from_numpy(theirs).float(), rtol=1e-5, atol=1e-7)


def test_neighbouring_filters_add_up_to_one() -> None:
    """Where one triangle falls the next rises, between the first and the last centre."""
    sums = mel_filters(MEL).sum(dim=1)
    centres = mel_filters(MEL).argmax(dim=0)
    torch.testing.assert_close(
        sums[centres[0] + 1 : centres[-1]], torch.ones(int(centres[-1] - centres[0]) - 1), rtol=0, atol=1e-5
    )


def test_a_tone_lies_in_the_mel_of_its_frequency() -> None:
    hz = [300.0, 1000.0, 2500.0]
    mel = log_mel(tones(hz), MEL)
    assert mel.shape == (3, 16, MEL.frames(4000))
    ends = 2595 * math.log10(1 + 4000 / 700)
    for row, frequency in enumerate(hz):
        expected = 2595 * math.log10(1 + frequency / 700) / ends * 17 - 1
        assert mel[row].mean(dim=1).argmax().item() == pytest.approx(expected, abs=0.51)


def test_spectrogram_is_that_of_transformers() -> None:
    from transformers.audio_utils import spectrogram, window_function

    waveform = torch.rand(4000, generator=torch.Generator().manual_seed(0)) - 0.5
    theirs = spectrogram(
        waveform.double().numpy(),
        window_function(256, "hann"),
        256,
        80,
        power=2.0,
        mel_filters=mel_filters(MEL).double().numpy(),
        mel_floor=1e-10,
        log_mel="log10",
    )
    torch.testing.assert_close(log_mel(waveform[None], MEL)[0], torch.from_numpy(theirs).float(), rtol=1e-4, atol=1e-4)


def test_silence_is_at_the_floor() -> None:
    assert (log_mel(torch.zeros(1, 1000), MEL) == -10).all()


def test_impossible_spectrograms_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"high_hz = 5000: must be 0 <= low_hz < high_hz <= 4000"):
        MelConfig(sample_rate=RATE, high_hz=5000)
    with pytest.raises(ConfigError, match="some mels hold no frequency"):
        MelConfig(sample_rate=RATE, mels=128, window=64, high_hz=4000)
    with pytest.raises(ConfigError, match="scale = 'bark'"):
        MelConfig(scale="bark")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="hop = 0"):
        MelConfig(hop=0)
    with pytest.raises(InputError, match="need more than 128"):
        log_mel(torch.zeros(1, 128), MEL)


# -- CLAP --------------------------------------------------------------------------------------------------------------


def save_clap(folder: Path, truncation: str) -> Path:
    torch.manual_seed(0)
    config = transformers.ClapAudioConfig(
        window_size=4,
        num_mel_bins=64,
        spec_size=64,
        patch_size=4,
        patch_stride=[4, 4],
        num_classes=3,
        hidden_size=32,
        projection_dim=12,
        depths=[1, 1],
        num_attention_heads=[2, 2],
        patch_embeds_hidden_size=16,
        enable_fusion=truncation == "fusion",
        fusion_type="aff_2d" if truncation == "fusion" else None,
    )
    transformers.ClapAudioModelWithProjection(config).save_pretrained(folder)
    transformers.ClapFeatureExtractor(
        sampling_rate=RATE, max_length_s=1, hop_length=160, fft_window_size=512, frequency_max=4000,
        truncation=truncation,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def clap_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clap(tmp_path_factory.mktemp("clap"), "rand_trunc")


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
@pytest.mark.parametrize("samples", [3000, 8000])
def test_embeddings_are_claps_own(tmp_path: Path, truncation: str, samples: int) -> None:
    encoder = load_clap(save_clap(tmp_path, truncation))
    waveforms = tones([300.0, 2000.0], samples)
    network = transformers.ClapAudioModelWithProjection.from_pretrained(tmp_path).eval()
    extractor = transformers.ClapFeatureExtractor.from_pretrained(tmp_path)
    inputs = extractor(list(waveforms.numpy()), sampling_rate=RATE, return_tensors="pt")
    # Of sounds that are none too long, the extractor calls one long at random, for training in several processes.
    with torch.no_grad():
        theirs = network(inputs["input_features"].float(), is_longer=torch.zeros(2, 1, dtype=torch.bool)).audio_embeds
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr]
    conditioning = encoder.encode(Audio(waveforms, RATE))
    assert conditioning.context.shape == (2, encoder.length, encoder.width) == (2, 1, 12)
    torch.testing.assert_close(conditioning.context[:, 0], theirs, rtol=1e-5, atol=1e-5)
    assert not conditioning.context.is_inference()
    assert encoder.null(2).context.shape == (2, 1, 12)
    assert not encoder.null(2).context.any()
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]


def test_claps_limits_are_held(clap_folder: Path) -> None:
    encoder = load_clap(clap_folder)
    with pytest.raises(InputError, match="sample rate is 16000 Hz: this encoder needs 8000 Hz"):
        encoder.encode(Audio(tones([300.0]), 16000))
    with pytest.raises(InputError, match="8001 samples: at most 8000, 1 s"):
        encoder.encode(Audio(tones([300.0], 8001), RATE))


def test_absent_and_corrupt_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="ClapFeatureExtractor in"):
        load_clap(tmp_path)
    save_clap(tmp_path, "rand_trunc")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(FolderError, match="can't be read"):
        load_clap(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FolderError, match="never from pickles"):
        load_clap(tmp_path)


@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        (torch.zeros(100), r"\(100,\): must be torch.float32 \[batch, samples\]"),
        (torch.zeros(1, 100, dtype=torch.int16), "torch.int16"),
        (torch.zeros(0, 100), r"\(0, 100\)"),
        (torch.full((1, 100), 3.0), r"reach 3: must be in \[-1, 1\]"),
        (torch.full((1, 100), math.nan), "reach nan"),
    ],
)
def test_other_waveforms_are_refused(waveforms: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Audio(waveforms, RATE)


# -- trained -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder() -> AudioEncoder:
    torch.manual_seed(0)
    return AudioEncoder(AudioEncoderConfig(samples=4000, mel=MEL, width=16, layers=1, heads=2))


def test_tokens_carry_gradients(encoder: AudioEncoder) -> None:
    conditioning = encoder.encode(Audio(tones([300.0, 2000.0]), RATE))
    assert conditioning.context.shape == (2, encoder.length, encoder.width) == (2, 13, 16)
    (conditioning.context.square().sum() + encoder.null(2).context.sum()).backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_shorter_sounds_are_filled_up_with_silence(encoder: AudioEncoder) -> None:
    waveforms = tones([300.0])
    waveforms[:, 2500:] = 0
    short, filled = (encoder.encode(Audio(part, RATE)).context for part in (waveforms[:, :2500], waveforms))
    torch.testing.assert_close(short, filled)


def test_null_has_the_shape_of_a_sound(encoder: AudioEncoder) -> None:
    assert encoder.null(3).context.shape == encoder.encode(Audio(tones([1.0, 2.0, 3.0]), RATE)).context.shape


def test_identity_follows_the_weights(encoder: AudioEncoder) -> None:
    before = encoder.identity
    assert before == encoder.identity
    with torch.no_grad():
        encoder.silence += 1
    assert encoder.identity != before


def test_other_sounds_and_shapes_are_refused(encoder: AudioEncoder) -> None:
    with pytest.raises(InputError, match="sample rate is 16000 Hz"):
        encoder.encode(Audio(tones([300.0]), 16000))
    with pytest.raises(InputError, match="4001 samples: this encoder takes 4000"):
        encoder.encode(Audio(tones([300.0], 4001), RATE))
    with pytest.raises(ConfigError, match="width = 10, heads = 4"):
        AudioEncoderConfig(width=10)
    with pytest.raises(ConfigError, match="samples = 100: must be more than 200"):
        AudioEncoderConfig(samples=100)
