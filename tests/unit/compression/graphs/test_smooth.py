"""SmoothQuant: the same function, with outlier channels where they cost nothing."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from llmo.compression.graph import producers
from llmo.compression.graphs import smooth, static
from llmo.compression.graphs.calibration import activations, logits
from llmo.compression.graphs.layers import linear_layers

OUTLIER = 5  # the channel that the classifier of these tests has twenty times the others


def change(before: list[np.ndarray], after: list[np.ndarray]) -> float:
    return float(np.abs(np.stack(before) - np.stack(after)).max())


@pytest.mark.parametrize("alpha", [None, 0.5, 0.8])
def test_the_function_stays_what_it_was(model: onnx.ModelProto, texts: list[list[int]], alpha: float | None) -> None:
    before = logits(model, texts)
    report = smooth.rescale(model, texts[:30], alpha)
    assert any(found.place for found in report)
    assert change(before, logits(model, texts)) < 1e-5


def test_an_outlier_channel_is_found_and_moved(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    sources = [layer.source for layer in linear_layers(model.graph) if "intermediate" in layer.name]
    values = np.concatenate([found[sources[0]] for found in activations(model, sources, texts)])
    largest = np.abs(values).max(axis=0)
    assert largest[OUTLIER] > 8 * np.median(largest)
    report = smooth.rescale(model, texts[:30])
    found = {name: one for one in report for name in one.layers}
    moved = found["bert.encoder.layer.0.intermediate.dense"]
    assert moved.place == "product"  # BERT adds the same values to what the layer says
    assert moved.after < 0.5 * moved.before
    layer = next(layer for layer in linear_layers(model.graph) if "layer.0.intermediate" in layer.name)
    values = np.concatenate([one[layer.source] for one in activations(model, [layer.source], texts)])
    largest = np.abs(values).max(axis=0)
    assert largest[OUTLIER] < 4 * np.median(largest)


def test_static_int8_comes_closer(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    before, rough = logits(model, texts), onnx.ModelProto()
    rough.CopyFrom(model)
    static.quantise(rough, static.ranges(rough, texts[:30]))
    smooth.rescale(model, texts[:30])
    static.quantise(model, static.ranges(model, texts[:30]))
    plain, smoothed = (float(np.mean((np.stack(logits(one, texts)) - np.stack(before)) ** 2)) for one in (rough, model))
    assert smoothed < 0.5 * plain


def test_attention_costs_no_node_and_a_norm_of_its_own_costs_none(
    model: onnx.ModelProto, texts: list[list[int]]
) -> None:
    """Without the residual Add the norm before is read by layers alone, as in models that norm first."""
    norms = {name for name, node in producers(model.graph).items() if node.op_type == "LayerNormalization"}
    for node in model.graph.node:
        if node.op_type == "Add" and node.input[1] in norms:
            node.input[1] = node.input[0]
    before, count = logits(model, texts), len(model.graph.node)
    report = smooth.rescale(model, texts[:30], 0.7)
    assert {found.place for found in report} == {"norm", "values"}
    assert len(model.graph.node) == count
    assert change(before, logits(model, texts)) < 1e-5


def test_what_is_not_worth_it_is_left_alone(
    model: onnx.ModelProto, texts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smooth, "WORTH", 0.0)
    before = model.SerializeToString()
    report = smooth.rescale(model, texts[:30])
    assert {found.place for found in report} == {None}
    assert all(found.before == found.after > 0 for found in report)
    assert model.SerializeToString() == before


def test_values_that_something_else_reads_are_not_divided(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    attention = next(node for node in model.graph.node if node.op_type == "MultiHeadAttention")
    reader = helper.make_node("Identity", [attention.input[2]], ["values"])
    model.graph.node.insert(list(model.graph.node).index(attention) + 1, reader)
    model.graph.output.append(helper.make_tensor_value_info("values", onnx.TensorProto.FLOAT, None))
    before = logits(model, texts)
    report = smooth.rescale(model, texts[:30], 0.7)
    assert [found.place for found in report if "attention.output" in found.layers[0]] == [None, "values"]
    assert change(before, logits(model, texts)) < 1e-5
