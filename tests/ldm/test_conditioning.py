from __future__ import annotations

import pytest
import torch

from ldm.conditioning import Conditioning
from ldm.errors import InputError

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
    with pytest.raises(InputError, match="2 shapes"):
        Conditioning.concatenate([Conditioning(CONTEXT), Conditioning(CONTEXT[:, :2])])
    with pytest.raises(InputError, match="1 of 2 conditions have `pooled`"):
        Conditioning.concatenate([Conditioning(CONTEXT), Conditioning(CONTEXT, pooled=torch.ones(2, 1))])
