"""The LSTM: padding changes nothing, it opens in plain transformers, and it becomes an ONNX graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification

from llmo.compression.export import _difference, _exported, _torch_logits
from llmo.engines.heads import Head
from llmo.engines.lstm import LstmConfig, LstmForSequenceClassification


def made(auto: type, layers: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LstmConfig(vocab_size=90, hidden_size=16, num_hidden_layers=layers, initializer_range=1.0)
    config.num_labels = 3
    return auto.from_config(config).eval()


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModel])
def test_a_text_says_the_same_alone_and_beside_longer_ones(auto: type) -> None:
    model = made(auto)
    ids = torch.arange(5, 45).reshape(4, 10)
    lengths = torch.tensor([10, 1, 4, 7])
    mask = (torch.arange(10)[None] < lengths[:, None]).long()
    with torch.inference_mode():
        together = model(input_ids=ids * mask, attention_mask=mask)[0]
        for i, length in enumerate(lengths.tolist()):
            alone = model(input_ids=ids[i : i + 1, :length])[0][0]
            beside = together[i] if together.ndim == 2 else together[i, :length]
            assert torch.allclose(alone, beside, atol=1e-6)


def test_both_ends_of_a_text_count() -> None:
    model = made(AutoModelForTokenClassification, layers=1)
    ids = torch.arange(5, 13)[None]
    with torch.inference_mode():
        whole = model(input_ids=ids).logits[0]
        for place in (0, 7):
            changed = ids.clone()
            changed[0, place] = 80
            assert (model(input_ids=changed).logits[0] - whole).abs().min(1).values.max() > 0
            assert not torch.allclose(model(input_ids=changed).logits[0, 3], whole[3])


def test_its_folder_opens_in_transformers(tmp_path: Path) -> None:
    model = made(AutoModelForSequenceClassification)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "llmo-lstm"
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert isinstance(again, LstmForSequenceClassification)
    ids = torch.arange(5, 15)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_its_head_stands_by_itself() -> None:
    model = made(AutoModelForSequenceClassification)
    head = Head(model.config, AutoModelForSequenceClassification.from_config, model.state_dict())
    ids, mask = torch.arange(5, 25).reshape(2, 10), torch.ones(2, 10, dtype=torch.int64)
    mask[1, 6:] = 0
    with torch.inference_mode():
        hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.allclose(head(hidden, mask), model(input_ids=ids, attention_mask=mask).logits, atol=1e-6)
    assert head.says()


def test_it_becomes_an_onnx_graph(tmp_path: Path) -> None:
    model = made(AutoModelForSequenceClassification, layers=1)
    onnx.save(_exported(model), tmp_path / "model.onnx")
    expected = [_torch_logits(model, length) for length in (2, 7, 33)]
    assert _difference(tmp_path / "model.onnx", expected) < 1e-5
    assert np.abs(expected[0]).max() > 0
