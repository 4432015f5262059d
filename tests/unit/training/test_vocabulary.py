"""Training the used rows of the embedding alone is training them all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmo.specs import TrainSpec
from llmo.tasks.text_classification import TextClassification
from llmo.training import optimiser, vocabulary
from llmo.training.model import Built, build, set_training

TASK = TextClassification(["a", "b"], max_length=32)
IDS = torch.tensor([[2, 7, 9, 3], [2, 40, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
STEPS = 4


def trained(base: Path, narrowed: bool, spec: TrainSpec) -> Built:
    torch.manual_seed(0)
    built = build(base, TASK, spec)
    used = vocabulary.narrow(built, IDS.numpy().ravel(), spec) if narrowed else None
    assert (used is not None) == narrowed
    set_training(built.model)
    made = optimiser.build(list(built.trainable()), spec)
    for step in range(STEPS):
        for group in made.param_groups:
            group["lr"] = optimiser.rate(spec, step, STEPS)
        loss = TASK.loss(built.model(input_ids=IDS, attention_mask=MASK).logits, torch.tensor([0, 1]), None)
        loss.backward()
        made.step()
        made.zero_grad()
    if used is not None:
        assert used.weight.shape[0] == len(np.unique(IDS))
        used.shrink = vocabulary.shrunk(spec, STEPS, STEPS)
        before = said(built)
        vocabulary.restore(built, used)
        assert torch.allclose(said(built), before, atol=1e-6)
    return built


def said(built: Built) -> torch.Tensor:
    """Of texts with tokens that training never saw."""
    built.model.eval()
    with torch.no_grad():
        logits: torch.Tensor = built.model(input_ids=torch.tensor([[2, 7, 55, 3], [2, 56, 57, 3]])).logits
    return logits


def test_the_result_is_that_of_the_whole_embedding(base: Path) -> None:
    spec = TrainSpec(learning_rate=1e-2, weight_decay=0.3, dropout=0.0)
    whole, narrowed = trained(base, False, spec), trained(base, True, spec)
    for (name, expected), (_, found) in zip(
        whole.network.state_dict().items(), narrowed.network.state_dict().items(), strict=True
    ):
        assert torch.allclose(expected, found, atol=1e-6), name
    start = build(base, TASK, spec).network.get_input_embeddings().weight
    assert not torch.allclose(whole.network.get_input_embeddings().weight[55], start[55], atol=1e-4)  # it did decay


@pytest.mark.parametrize("keys", [{"method": "head"}, {"optimizer": "sgd"}])
def test_nothing_is_narrowed_where_it_is_not_the_same(base: Path, keys: dict[str, str]) -> None:
    spec = TrainSpec(**keys)
    built = build(base, TASK, spec)
    before = built.network.get_input_embeddings()
    assert vocabulary.narrow(built, IDS.numpy().ravel(), spec) is None
    assert built.network.get_input_embeddings() is before


def test_a_text_that_uses_most_words_keeps_the_whole_embedding(base: Path) -> None:
    built = build(base, TASK, TrainSpec())
    whole = built.network.get_input_embeddings()
    assert vocabulary.narrow(built, np.arange(whole.num_embeddings), TrainSpec()) is None
