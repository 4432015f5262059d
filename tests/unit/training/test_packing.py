"""Packed rows against attention with a mask over the whole row: the same numbers and gradients, at any lengths."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from llmo.training import packing

CPU = torch.device("cpu")
HEADS, KEYS, WIDTH = 6, 2, 16
SHAPES = [(3, [9, 5, 14, 3, 6]), (0, [7, 7, 8]), (5, [6]), (20, [170, 290, 21, 160])]


def masked(inputs: list[torch.Tensor], common: int, lengths: list[int]) -> torch.Tensor:
    """The same by torch, with everything that a token may see written down."""
    query, key, value = inputs
    own = [torch.full((length - common,), i) for i, length in enumerate(lengths)]
    whose = torch.cat([torch.full((common,), -1), *own])
    place = torch.arange(len(whose))
    seen = ((whose[None] == whose[:, None]) | (whose[None] == -1)) & (place[None] <= place[:, None])
    wide = [x.repeat_interleave(HEADS // KEYS, 1) for x in (key, value)]
    return torch.nn.functional.scaled_dot_product_attention(query, *wide, attn_mask=seen).transpose(1, 2)


@pytest.mark.parametrize(("common", "lengths"), SHAPES)
@pytest.mark.parametrize("places", [packing.PLACES, 1])
def test_each_token_attends_to_its_own_sequence_and_the_common_beginning(
    monkeypatch: pytest.MonkeyPatch, common: int, lengths: list[int], places: int
) -> None:
    monkeypatch.setattr(packing, "PLACES", places)
    layout = packing.layout(lengths, common, CPU)
    torch.manual_seed(0)
    shapes = [(1, heads, len(layout.positions), WIDTH) for heads in (HEADS, KEYS, KEYS)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    found, _ = packing.attention(torch.nn.Module(), *inputs, None, packed=layout)
    expected = masked(inputs, common, lengths)
    assert torch.allclose(found, expected, atol=1e-5)
    weights = torch.randn_like(found)
    slopes = [torch.autograd.grad((said * weights).sum(), inputs) for said in (found, expected)]
    for one, other in zip(*slopes, strict=True):
        assert torch.allclose(one, other, atol=2e-5)


def test_positions_start_anew_and_blocks_hold_like_lengths() -> None:
    layout = packing.layout([5, 3, 100, 90], 2, CPU)
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 2, *range(2, 100), *range(2, 90)]
    assert [tuple(block.tokens.shape) for block in layout.blocks] == [(1, 2), (2, 98), (2, 3)]
    assert layout.blocks[1].real.sum().item() == 98 + 88
    for block in layout.blocks:  # a token of no place would be read from another sequence
        assert all(a <= b for row in block.tokens.tolist() for a, b in pairwise(row))


def test_a_sequence_that_is_all_common_has_no_tokens_of_its_own() -> None:
    layout = packing.layout([4, 6], 4, CPU)
    assert len(layout.positions) == 6
    inputs = [torch.randn(1, heads, 6, WIDTH) for heads in (HEADS, KEYS, KEYS)]
    found, _ = packing.attention(torch.nn.Module(), *inputs, None, packed=layout)
    assert torch.allclose(found, masked(inputs, 4, [4, 6]), atol=1e-5)


@pytest.mark.parametrize(
    "asked", [{"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"sliding_window": 4}, {"dropout": 0.1}]
)
def test_what_is_not_done_is_refused(asked: dict[str, object]) -> None:
    layout = packing.layout([5, 3], 0, CPU)
    inputs = [torch.randn(1, heads, 8, WIDTH) for heads in (HEADS, KEYS, KEYS)]
    with pytest.raises(NotImplementedError, match="packed attention with " + next(iter(asked))):
        packing.attention(torch.nn.Module(), *inputs, None, packed=layout, **asked)  # type: ignore[arg-type]
    packing.attention(torch.nn.Module(), *inputs, None, packed=layout, sliding_window=5)
