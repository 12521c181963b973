from __future__ import annotations

import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.conditioning.dropout import ConditionDropout
from ldm.errors import ConfigError, InputError

CONTEXT = torch.arange(24.0).view(2, 3, 4)
MASK = torch.tensor([[True, False, False], [True, True, False]])


def test_rows_are_taken_from_all_parts() -> None:
    whole = Conditioning(CONTEXT, MASK, torch.tensor([[1.0], [2.0]]))
    for rows in (slice(1, 2), [1], torch.tensor([1])):
        part = whole[rows]
        assert torch.equal(part.context, CONTEXT[1:])
        assert part.mask is not None
        assert torch.equal(part.mask, MASK[1:])
        assert part.pooled is not None
        assert part.pooled.tolist() == [[2.0]]


def test_concatenation_is_the_inverse_of_taking_rows() -> None:
    whole = Conditioning(CONTEXT, MASK)
    again = Conditioning.concatenate([whole[:1], whole[1:]])
    assert torch.equal(again.context, CONTEXT)
    assert again.mask is not None
    assert torch.equal(again.mask, MASK)


def test_a_missing_mask_means_everywhere() -> None:
    both = Conditioning.concatenate([Conditioning(CONTEXT), Conditioning(CONTEXT, MASK)])
    assert both.mask is not None
    assert both.mask[:2].all()
    assert torch.equal(both.mask[2:], MASK)
    assert Conditioning.concatenate([Conditioning(CONTEXT)] * 2).mask is None


def test_expand_repeats_one_condition() -> None:
    expanded = Conditioning(CONTEXT[:1], MASK[:1]).expand(3)
    assert len(expanded) == 3
    assert torch.equal(expanded.context, CONTEXT[:1].repeat(3, 1, 1))
    with pytest.raises(InputError, match="this has 2"):
        Conditioning(CONTEXT).expand(3)


def test_to_changes_the_states_and_not_the_mask() -> None:
    half = Conditioning(CONTEXT, MASK, torch.ones(2, 1)).to(dtype=torch.bfloat16)
    assert half.context.dtype == torch.bfloat16
    assert half.mask is not None
    assert half.mask.dtype == torch.bool
    assert half.pooled is not None
    assert half.pooled.dtype == torch.bfloat16


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"context is \(2, 3\)"):
        Conditioning(CONTEXT[..., 0])
    with pytest.raises(InputError, match=r"mask is torch.float32 \(2, 3\): must be bool"):
        Conditioning(CONTEXT, MASK.float())
    with pytest.raises(InputError, match=r"pooled is \(1, 1\)"):
        Conditioning(CONTEXT, pooled=torch.ones(1, 1))
    with pytest.raises(InputError, match="no conditions"):
        Conditioning.concatenate([])
    with pytest.raises(InputError, match=r"2 widths, \[2, 4\]"):
        Conditioning.concatenate([Conditioning(CONTEXT), Conditioning(CONTEXT[..., :2])])
    with pytest.raises(InputError, match="1 of 2 conditions have `pooled`"):
        Conditioning.concatenate([Conditioning(CONTEXT), Conditioning(CONTEXT, pooled=torch.ones(2, 1))])


WHOLE = Conditioning(CONTEXT, MASK, torch.tensor([[1.0], [2.0]]), torch.tensor([[1001.0], [7.0]]), torch.tensor([3, 4]))
NULL = Conditioning(torch.full((1, 3, 4), -1.0), torch.ones(1, 3, dtype=torch.bool), torch.tensor([[-1.0]]))


def equal(one: Conditioning, other: Conditioning) -> bool:
    return one.parts.keys() == other.parts.keys() and all(
        torch.equal(part, other.parts[name]) for name, part in one.parts.items()
    )


def test_every_method_carries_every_field() -> None:
    assert WHOLE.parts.keys() == {"context", "mask", "pooled", "sizes", "noise_level"}
    assert equal(WHOLE[[0, 1]], WHOLE)
    assert equal(Conditioning.concatenate([WHOLE[:1], WHOLE[1:]]), WHOLE)
    assert equal(WHOLE[:1].expand(2), WHOLE[[0, 0]])
    assert equal(WHOLE.to("cpu"), WHOLE)
    assert WHOLE.to("meta").parts.keys() == WHOLE.parts.keys()
    assert all(part.device.type == "meta" for part in WHOLE.to("meta").parts.values())
    assert equal(Conditioning.join([WHOLE]), WHOLE)


def test_sizes_and_levels_keep_their_type() -> None:
    half = WHOLE.to(dtype=torch.bfloat16)
    assert half.sizes is not None
    assert half.sizes[0].item() == 1001
    assert half.noise_level is not None
    assert half.noise_level.dtype == torch.int64


def test_sizes_and_levels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"sizes is \(1, 1\): must be \[2, width\]"):
        Conditioning(CONTEXT, sizes=torch.ones(1, 1))
    with pytest.raises(InputError, match=r"noise_level is torch.float32 \(2,\): must be torch.int64 \(2,\)"):
        Conditioning(CONTEXT, noise_level=torch.ones(2))
    with pytest.raises(InputError, match="1 of 2 conditions have `noise_level`"):
        Conditioning.concatenate([Conditioning(CONTEXT), Conditioning(CONTEXT, noise_level=torch.tensor([1, 2]))])
    with pytest.raises(InputError, match="widths must be equal"):
        Conditioning.concatenate([Conditioning(CONTEXT, pooled=torch.ones(2, width)) for width in (1, 2)])


def test_dropped_rows_are_the_null_condition() -> None:
    mixed = WHOLE.where_null(torch.tensor([True, False]), NULL)
    assert equal(mixed[1:], WHOLE[1:])
    assert torch.equal(mixed.context[:1], NULL.context)
    assert mixed.mask is not None
    assert mixed.mask[0].all()
    assert mixed.pooled is not None
    assert mixed.pooled.tolist() == [[-1.0], [2.0]]
    assert mixed.sizes is WHOLE.sizes
    assert mixed.noise_level is WHOLE.noise_level


def test_a_null_of_one_chunk_drops_several() -> None:
    long = Conditioning(torch.cat([CONTEXT, CONTEXT], dim=1))
    dropped = long.where_null(torch.tensor([True, True]), Conditioning(NULL.context))
    assert (dropped.context == -1).all()
    assert dropped.context.shape == long.context.shape
    with pytest.raises(InputError, match="3 positions: can't be lengthened to 2"):
        NULL.lengthened(2)


@pytest.mark.parametrize("length", [3, 6, 7])
@pytest.mark.parametrize("mask", [None, MASK])
def test_attention_over_a_lengthened_context_is_the_same(length: int, mask: torch.Tensor | None) -> None:
    query = torch.randn(2, 1, 5, 4, generator=torch.Generator().manual_seed(0))

    def attended(part: Conditioning) -> torch.Tensor:
        shown = None if part.mask is None else part.mask[:, None, None]
        states = part.context[:, None]
        return torch.nn.functional.scaled_dot_product_attention(query, states, states, attn_mask=shown)

    before = Conditioning(CONTEXT, mask)
    after = before.lengthened(length)
    assert after.context.shape[1] == length
    torch.testing.assert_close(attended(after), attended(before))


def test_conditions_of_different_lengths_go_into_one_batch() -> None:
    both = Conditioning.concatenate([Conditioning(CONTEXT), Conditioning(CONTEXT[:, :2])])
    assert both.mask is not None
    assert both.mask.tolist() == [[True] * 3] * 2 + [[True, True, False]] * 2


@pytest.mark.parametrize(
    ("dropped", "null", "message"),
    [
        (torch.ones(2), NULL, r"dropped is torch.float32 \(2,\)"),
        (torch.ones(3, dtype=torch.bool), NULL, r"dropped is torch.bool \(3,\)"),
        (torch.ones(2, dtype=torch.bool), Conditioning(NULL.context), "must be of one encoder"),
        (torch.ones(2, dtype=torch.bool), Conditioning(NULL.context[..., :2], pooled=NULL.pooled), "of one encoder"),
    ],
)
def test_nulls_that_do_not_fit_are_refused(dropped: torch.Tensor, null: Conditioning, message: str) -> None:
    with pytest.raises(InputError, match=message):
        WHOLE.where_null(dropped, null)


def test_joined_conditions_follow_one_another() -> None:
    other = Conditioning(CONTEXT[:, :1] + 100, pooled=torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    joint = Conditioning.join([WHOLE, other])
    assert torch.equal(joint.context, torch.cat([CONTEXT, CONTEXT[:, :1] + 100], dim=1))
    assert joint.mask is not None
    assert joint.mask.tolist() == [[True, False, False, True], [True, True, False, True]]
    assert joint.pooled is not None
    assert joint.pooled.tolist() == [[1.0, 5.0, 6.0], [2.0, 7.0, 8.0]]
    assert joint.sizes is WHOLE.sizes


def test_conditions_that_can_not_be_joined_are_refused() -> None:
    with pytest.raises(InputError, match="no conditions to join"):
        Conditioning.join([])
    with pytest.raises(InputError, match=r"\[\(1, 4\), \(2, 4\)\]"):
        Conditioning.join([WHOLE, NULL])
    with pytest.raises(InputError, match="2 of the joined conditions have `sizes`"):
        Conditioning.join([WHOLE, WHOLE])


def test_each_condition_is_dropped_at_its_rate() -> None:
    """Of 20,000 draws, a frequency is within 5 standard deviations, 5·√(p(1 − p)/20000) ≤ 0.018."""
    dropout = ConditionDropout({"text": 0.1, "image": 0.5, "audio": 0.0}, all_rate=0.2)
    dropped = dropout.dropped(torch.rand(20000, dropout.draws, generator=torch.Generator().manual_seed(0)))
    for name, rate in dropout.rates.items():
        expected = 1 - (1 - rate) * (1 - 0.2)
        assert dropped[name].float().mean().item() == pytest.approx(expected, abs=0.018)
    together = (dropped["text"] & dropped["image"]).float().mean().item()
    assert together == pytest.approx(0.2 + 0.8 * 0.1 * 0.5, abs=0.018)
    assert (dropped["audio"] <= (dropped["text"] & dropped["image"])).all()


def test_impossible_dropout_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dropout of text = 1.5"):
        ConditionDropout({"text": 1.5})
    dropout = ConditionDropout({"text": 0.5})
    with pytest.raises(InputError, match=r"u is \(3, 1\): must be \[batch, 2\]"):
        dropout.dropped(torch.zeros(3, 1))
    with pytest.raises(InputError, match=r"must be in \[0, 1\)"):
        dropout.dropped(torch.ones(3, 2))
