"""The nominal work of encoders equals what torch counts in their products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from llmo.engines.work import nominal_work
from llmo.errors import ModelError

SIZES = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "vocab_size": 50,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
DISTILLED = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 48, "vocab_size": 50, "pad_token_id": 0}
CASES = [
    ("Bert", SIZES, "SequenceClassification", 5),
    ("Bert", SIZES, "TokenClassification", 3),
    ("Bert", SIZES, "MaskedLM", 2),
    ("Bert", SIZES, "QuestionAnswering", 2),
    ("Roberta", SIZES, "SequenceClassification", 4),
    ("DistilBert", DISTILLED, "SequenceClassification", 3),
    ("Electra", {**SIZES, "embedding_size": 12}, "SequenceClassification", 2),
]


@pytest.mark.parametrize(("family", "sizes", "head", "labels"), CASES)
def test_it_is_what_torch_counts(family: str, sizes: dict[str, Any], head: str, labels: int) -> None:
    config = getattr(transformers, f"{family}Config")(**sizes, num_labels=labels)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}For{head}")(config).eval()
    config.architectures = [type(model).__name__]
    work = nominal_work(config.to_dict())
    counted = []
    for tokens in (3, 17):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.ones(1, tokens, dtype=torch.long))
        counted.append(counter.get_total_flops())
        assert 2 * work.of([tokens]) == counted[-1]
    assert 2 * work.of([3, 17]) == sum(counted)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ModelError, match="there is no 'intermediate_size'"):
        nominal_work({"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1})
    with pytest.raises(ModelError, match="deberta-v2"):
        nominal_work({**SIZES, "model_type": "deberta-v2"})
