"""Several conditions in one model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.conditioning.audio import Audio, AudioEncoder, AudioEncoderConfig
from ldm.conditioning.joint import JointEncoder
from ldm.conditioning.mel import MelConfig
from ldm.errors import ConfigError, InputError

MEL = MelConfig(sample_rate=8000, mels=8, window=128, hop=64, high_hz=4000)
SOUNDS = Audio(torch.rand(2, 1000, generator=torch.Generator().manual_seed(0)), 8000)


@dataclass(frozen=True)
class Words:
    """Prompts' lengths as states, half of them hidden; frozen."""

    length: int = 4
    width: int = 6
    identity: str = "words"

    def encode(self, prompts: list[str]) -> Conditioning:
        sizes = torch.tensor([float(len(prompt)) for prompt in prompts])
        context = sizes[:, None, None] * torch.arange(24.0).view(4, 6)
        mask = torch.tensor([True, True, False, False]).expand(len(prompts), 4)
        return Conditioning(context, mask, sizes[:, None].expand(-1, 3))

    def null(self, count: int) -> Conditioning:
        return self.encode([""]).expand(count)


@pytest.fixture
def joint() -> JointEncoder:
    torch.manual_seed(0)
    audio = AudioEncoder(AudioEncoderConfig(samples=1000, mel=MEL, width=8, layers=1, heads=2))
    encoder = JointEncoder({"text": Words(), "audio": audio}, 10)
    with torch.no_grad():
        encoder.kinds["text"] += 1
    return encoder


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    """But for rounding: projections of a repeated row may take another kernel than those of rows in memory."""
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_contexts_follow_one_another(joint: JointEncoder) -> None:
    both = joint.encode({"text": ["one", "three"], "audio": SOUNDS})
    assert both.context.shape == (2, joint.length, joint.width) == (2, 8, 10)
    assert both.mask is not None
    assert both.mask.tolist() == [[True, True, False, False] + [True] * 4] * 2
    assert both.pooled is not None
    assert both.pooled.tolist() == [[3.0] * 3, [5.0] * 3]
    # A projection of norm 1 and mean 0, moved by its kind's embedding.
    torch.testing.assert_close(both.context[:, :4].mean(dim=2), torch.ones(2, 4))
    torch.testing.assert_close(both.context[:, 4:].mean(dim=2), torch.zeros(2, 4), atol=1e-6, rtol=0)


def test_what_is_not_given_is_null(joint: JointEncoder) -> None:
    null, text = joint.null(2), joint.encode({"text": ["one", "three"]})
    assert torch.equal(text.context[:, 4:], null.context[:, 4:])
    assert not torch.allclose(text.context[:, :4], null.context[:, :4])
    both = joint.encode({"audio": SOUNDS, "text": ["one", "three"]})
    assert torch.equal(both.context[:, :4], text.context[:, :4])
    assert len(Conditioning.concatenate([null, text, both])) == 6


def test_each_condition_can_be_left_out(joint: JointEncoder) -> None:
    conditions = {name: joint.encoders[name].encode(each) for name, each in (("text", ["a", "b"]), ("audio", SOUNDS))}
    whole = joint(conditions)
    for name, part in (("text", slice(4)), ("audio", slice(4, 8))):
        without = joint.without(conditions, [name])
        assert_same(without.context[:, part], joint.null(2).context[:, part])
        changed = (without.context != whole.context).any(dim=2).any(dim=0)
        assert changed[part].all()
        assert changed.sum() == 4
    assert_same(joint.without(conditions, ["text", "audio"]).context, joint.null(2).context)


def test_dropped_rows_are_null(joint: JointEncoder) -> None:
    dropped = {"text": torch.tensor([True, False]), "audio": torch.tensor([False, False])}
    given = {"text": ["one", "three"], "audio": SOUNDS}
    mixed, whole, null = joint.encode(given, dropped), joint.encode(given), joint.null(2)
    assert_same(mixed.context[0, :4], null.context[0, :4])
    assert torch.equal(mixed.context[0, 4:], whole.context[0, 4:])
    assert torch.equal(mixed.context[1], whole.context[1])
    assert mixed.pooled is not None
    assert mixed.pooled.tolist() == [[0.0] * 3, [5.0] * 3]


def test_everything_learns_but_the_frozen(joint: JointEncoder) -> None:
    dropped = {"audio": torch.tensor([True, False])}
    joint.encode({"text": ["one", "three"], "audio": SOUNDS}, dropped).context.pow(3).sum().backward()
    assert all(parameter.grad is not None for parameter in joint.parameters())
    names = {name.split(".")[0] for name, _ in joint.named_parameters()}
    assert names == {"trained", "projections", "kinds"}


def test_weights_are_saved_and_loaded(joint: JointEncoder) -> None:
    torch.manual_seed(1)
    audio = AudioEncoder(AudioEncoderConfig(samples=1000, mel=MEL, width=8, layers=1, heads=2))
    again = JointEncoder({"text": Words(), "audio": audio}, 10)
    assert again.identity != joint.identity
    again.load_state_dict(joint.state_dict())
    assert again.identity == joint.identity
    given = {"text": ["one", "three"], "audio": SOUNDS}
    assert torch.equal(again.encode(given).context, joint.encode(given).context)


def test_what_does_not_fit_is_refused(joint: JointEncoder) -> None:
    with pytest.raises(InputError, match="smell: no such condition, this model has text, audio"):
        joint.encode({"smell": []})
    with pytest.raises(InputError, match=r"{'text': 1, 'audio': 2} rows"):
        joint.encode({"text": ["one"], "audio": SOUNDS})
    with pytest.raises(InputError, match="at least one condition"):
        joint.encode({})
    with pytest.raises(ConfigError, match="0 encoders"):
        JointEncoder({}, 4)
