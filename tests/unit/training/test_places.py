"""A loss at chosen places equals the loss of all logits there, in any chunks, and what is hidden follows the epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForMaskedLM, DistilBertConfig, OPTConfig, OPTForSequenceClassification

from llmo.tasks.base import IGNORED
from llmo.tasks.masked_lm import MaskedLm
from llmo.training import batches, places
from llmo.training.places import Masked, Places
from support.tiny import text_rows, tiny_model, tiny_tokenizer

ROWS = text_rows(24)


@pytest.fixture
def network(tmp_path: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_pretrained(tiny_model(tmp_path / "base")).eval()


def some(network: torch.nn.Module) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rng = np.random.default_rng(1)
    ids = torch.from_numpy(rng.integers(5, 90, (6, 16)))
    targets = torch.where(torch.from_numpy(rng.random((6, 16)) < 0.3), ids, IGNORED)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, targets


@pytest.mark.parametrize("chunk", [places.CHUNK_BYTES, 1])
def test_loss_and_gradients_are_those_of_all_logits(
    network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(places, "CHUNK_BYTES", chunk)
    inputs, targets = some(network)
    made = Places(network)
    assert made.apart
    found = made.losses(inputs, targets)
    ours = torch.autograd.grad(found, list(network.parameters()), allow_unused=True)
    logits = network(**inputs).logits.flatten(0, 1)
    whole = functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    theirs = torch.autograd.grad(whole, list(network.parameters()), allow_unused=True)
    assert found.item() == pytest.approx(whole.item(), rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-4)


def test_a_batch_in_which_nothing_is_to_be_found_changes_nothing(network: torch.nn.Module) -> None:
    inputs, targets = some(network)
    lost = Places(network).losses(inputs, torch.full_like(targets, IGNORED))
    lost.backward()
    assert lost.item() == 0.0
    assert not any(p.grad.any() for p in network.parameters() if p.grad is not None)


def test_what_is_judged_is_what_is_lost(network: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "CHUNK_BYTES", 1)
    inputs, targets = some(network)
    found = Places(network).judge(inputs, targets)
    assert found.shape == ((targets != IGNORED).sum(), 2)
    assert -found[:, 0].sum().item() == pytest.approx(Places(network).losses(inputs, targets).item(), rel=1e-4)


def test_a_head_of_several_parts_has_all_of_its_logits_made() -> None:
    config = DistilBertConfig(vocab_size=100, dim=16, n_heads=2, n_layers=1, hidden_dim=32, max_position_embeddings=32)
    network = AutoModelForMaskedLM.from_config(config).eval()
    made = Places(network)
    assert not made.apart
    inputs, targets = some(network)
    logits = network(**inputs).logits.flatten(0, 1)
    whole = functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    assert made.losses(inputs, targets).item() == pytest.approx(whole.item(), rel=1e-5)


def test_the_head_of_the_last_token_is_that_of_every_token() -> None:
    config = OPTConfig(vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=1)
    config.pad_token_id, config.num_labels = 0, 62
    network = OPTForSequenceClassification(config).eval()
    inputs, _ = some(network)
    inputs["input_ids"] %= 64
    inputs["input_ids"][inputs["input_ids"] == 0] = 1
    inputs["attention_mask"][1, 5:] = 0
    inputs["input_ids"][1, 5:] = 0
    made = Places(network)
    assert made.apart
    with torch.inference_mode():
        assert torch.allclose(made.last(inputs), network(**inputs).logits, atol=1e-6)


def test_what_is_hidden_follows_seed_epoch_and_row_and_not_the_batch(network: torch.nn.Module, tmp_path: Path) -> None:
    task = MaskedLm.from_rows(ROWS, max_length=32, options=MaskedLm.of_base(tiny_model(tmp_path / "again")))
    data = batches.encode(task, tiny_tokenizer(), ROWS, lambda done: None)

    def shown(seed: int, epoch: int, rows: list[int]) -> list[list[int]]:
        goal = Masked(Places(network), task, data, seed, 0)
        inputs, targets = goal.batch(np.array(rows), epoch)
        assert goal.mass(targets, np.array(rows)) == float((targets != IGNORED).sum()) > 0
        return [ids[mask.bool()].tolist() for ids, mask in zip(*inputs.values(), strict=True)]

    one = shown(1, 0, [0, 1, 2, 3])
    assert one == shown(1, 0, [0, 1]) + shown(1, 0, [2, 3])
    assert one != shown(1, 1, [0, 1, 2, 3])
    assert one != shown(2, 0, [0, 1, 2, 3])
    assert not any(4 in data.ids[data.starts[i] : data.starts[i + 1]] for i in range(4)), "the rows stay as they are"
