"""The CPU's dropout and attention against torch's and transformers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel

from llmo.training import dropout


@pytest.mark.parametrize("probability", [0.05, 0.1, 0.5])
def test_the_share_dropped_and_the_mean_are_right(probability: float) -> None:
    torch.manual_seed(0)
    kept = dropout.drop(torch.ones(1000, 1000), probability)
    assert float((kept == 0).float().mean()) == pytest.approx(probability, abs=0.003)
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.003)
    assert len(kept.unique()) == 2


def test_every_byte_of_a_word_is_drawn_alike() -> None:
    torch.manual_seed(0)
    dropped = (dropout.drop(torch.ones(80_000), 0.5) == 0).view(-1, 8).float().mean(0)
    assert dropped.sub(0.5).abs().max().item() < 0.02


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    dropped = (dropout.drop(torch.ones(400_000), 0.5) == 0).double()
    both = dropped[:-1] * dropped[1:]
    assert both.mean().item() == pytest.approx(0.25, abs=0.005)


@pytest.mark.parametrize(("probability", "total"), [(0.0, 60.0), (1.0, 0.0)])
def test_the_ends(probability: float, total: float) -> None:
    assert dropout.drop(torch.ones(3, 20), probability).sum().item() == total


def test_the_gradient_follows_the_mask() -> None:
    torch.manual_seed(0)
    x = torch.ones(1003, requires_grad=True)  # not a multiple of eight
    y = dropout.drop(x, 0.5)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())


def test_it_comes_from_torchs_generator() -> None:
    torch.manual_seed(7)
    first = dropout.drop(torch.ones(100), 0.5)
    torch.manual_seed(7)
    assert torch.equal(first, dropout.drop(torch.ones(100), 0.5))


def test_modules_are_replaced_and_silent_in_eval() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.Sequential(nn.Dropout(0.1)))
    model[2].eval()
    names = list(model.state_dict())
    dropout.replace_dropout(model)
    assert [m.p for m in model.modules() if isinstance(m, dropout.ByteDropout)] == [0.3, 0.1]
    assert not model[2][0].training
    assert list(model.state_dict()) == names
    model.eval()
    x = torch.randn(2, 4)
    assert torch.equal(model(x), model[0](x))


def test_attention_equals_transformers_own(base: Path) -> None:
    torch.manual_seed(0)
    ids = torch.randint(5, 60, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    found = {}
    for name in ("eager", "sdpa", dropout.ATTENTION):
        model = AutoModel.from_pretrained(base, attn_implementation=name).eval()
        with torch.no_grad():
            found[name] = model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert torch.allclose(found["eager"], found[dropout.ATTENTION], atol=1e-5)
    assert torch.allclose(found["sdpa"], found[dropout.ATTENTION], atol=1e-5)


def test_padding_is_not_attended_to_in_bf16(base: Path) -> None:
    model = AutoModel.from_pretrained(base, attn_implementation=dropout.ATTENTION).eval()
    ids = torch.randint(5, 60, (1, 6))
    wide = torch.cat([ids, torch.zeros(1, 10, dtype=torch.int64)], 1)
    mask = (torch.arange(16) < 6)[None].long()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        short = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        long = model(input_ids=wide, attention_mask=mask).last_hidden_state[:, :6]
    assert torch.isfinite(long).all()
    assert torch.allclose(short.float(), long.float(), atol=0.1)


def test_attention_drops_weights_in_training_only(base: Path) -> None:
    model = AutoModel.from_pretrained(base, attn_implementation=dropout.ATTENTION, hidden_dropout_prob=0.0)
    ids = torch.randint(5, 60, (1, 12))
    with torch.no_grad():
        model.eval()
        calm = [model(input_ids=ids).last_hidden_state for _ in range(2)]
        model.train()
        wild = [model(input_ids=ids).last_hidden_state for _ in range(2)]
    assert torch.equal(*calm)
    assert not torch.equal(*wild)
