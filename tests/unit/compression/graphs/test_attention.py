"""Attention spelt out: the answers of the fused node, padding or not."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime

from llmo.compression.graphs.attention import spell
from llmo.compression.graphs.calibration import logits


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def run(model: onnx.ModelProto, texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(texts), max(map(len, texts))), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found, hidden = session.run(["logits", "hidden"], {"input_ids": ids, "attention_mask": mask})
    return found, hidden[mask.astype(bool)]


def test_answers_and_hidden_states_stay_with_padding(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    before = run(model, texts)
    spell(model)
    assert "MultiHeadAttention" not in kinds(model)
    assert kinds(model).count("Softmax") == 2
    assert kinds(model).count("Unsqueeze") == 1  # one mask for both layers
    for expected, found in zip(before, run(model, texts), strict=True):
        assert np.abs(expected - found).max() < 1e-5
    assert np.abs(run(model, texts)[0][3] - logits(model, [texts[3]])[0]).max() < 1e-5


def test_attention_of_another_kind_stays(model: onnx.ModelProto) -> None:
    attention = next(node for node in model.graph.node if node.op_type == "MultiHeadAttention")
    attention.input[3] = attention.input[0]  # a bias inside
    spell(model)
    assert kinds(model).count("MultiHeadAttention") == 1
