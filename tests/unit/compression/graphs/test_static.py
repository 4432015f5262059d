"""Static int8: close, the same alone and in any batch, and mixed with a scale a token."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from llmo.compression import quantise as dynamic
from llmo.compression.graphs import static
from llmo.compression.graphs.calibration import activations, logits
from llmo.compression.graphs.layers import linear_layers


def product(weight: np.ndarray, bias: np.ndarray | None = None) -> onnx.ModelProto:
    """A graph `logits = x @ weight + bias` over token ids, `x` being a table of 40 rows."""
    rng = np.random.default_rng(0)
    table = rng.uniform(-1, 3, (40, len(weight))).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["x"]),
        helper.make_node("Cast", ["attention_mask"], ["unread"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["logits" if bias is None else "y"]),
    ]
    constants = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(weight, "w")]
    if bias is not None:
        nodes.append(helper.make_node("Add", ["bias", "y"], ["logits"]))
        constants.append(numpy_helper.from_array(bias, "bias"))
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"])
        for name in ("input_ids", "attention_mask")
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", weight.shape[1]])]
    graph = helper.make_graph(nodes, "product", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def test_logits_stay_close_and_every_bias_is_inside(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    before = logits(model, texts)
    adds = kinds(model).count("Add")
    found = static.quantise(model, static.ranges(model, texts[:30]))
    assert kinds(found).count("MatMulIntegerToFloat") == 2 * 6
    assert kinds(found).count("QuantizeLinear") == 2 * 4  # query, key and value read the same values
    assert "MatMul" not in kinds(found)
    assert adds - kinds(found).count("Add") == 2 * 6
    after = logits(found, texts)
    errors = [np.abs(a - b).max() for a, b in zip(before, after, strict=True)]
    assert 0 < max(errors) < 0.25 * max(np.abs(a).max() for a in before)


def test_an_answer_does_not_depend_on_its_batch(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    found = dynamic.quantise(static.quantise(model, static.ranges(model, texts[:30])))
    alone = logits(found, texts[:8])
    ids = np.zeros((8, max(map(len, texts[:8]))), np.int64)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts[:8]):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    session = onnxruntime.InferenceSession(found.SerializeToString(), providers=["CPUExecutionProvider"])
    together = session.run(["logits"], {"input_ids": ids, "attention_mask": mask})[0]
    assert np.abs(together - np.stack(alone)).max() < 1e-5


def test_kept_layers_get_a_scale_a_token_or_stay(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    kept = {linear_layers(model.graph)[0].output, linear_layers(model.graph)[-1].output}
    found = static.quantise(model, static.ranges(model, texts[:30]), keep=kept)
    assert {layer.output for layer in linear_layers(found.graph)} == kept
    dynamic.quantise(found, keep={min(kept)})
    assert [layer.output for layer in linear_layers(found.graph)] == [min(kept)]
    assert kinds(found).count("ReduceMax") == 1


def test_ranges_hold_all_but_the_share_outside(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    name = linear_layers(model.graph)[0].source
    values = np.concatenate([found[name].ravel() for found in activations(model, [name], texts)])
    low, high = static.ranges(model, texts, outside=0)[name]
    assert (low, high) == (values.min(), values.max())
    low, high = static.ranges(model, texts, outside=0.01)[name]
    assert np.mean(values < low) == pytest.approx(0.01, abs=1e-3)
    assert np.mean(values > high) == pytest.approx(0.01, abs=1e-3)


@pytest.mark.parametrize("bias", [None, np.arange(8, dtype=np.float32), np.arange(8, dtype=np.float32)[None, None]])
def test_a_product_of_one_sided_values_uses_every_level(bias: np.ndarray | None) -> None:
    """Values from -1 to 3: a zero point that is not in the middle halves the step."""
    weight = np.random.default_rng(1).normal(size=(64, 8)).astype(np.float32)
    text = [list(range(40))]
    before = product(weight, bias)
    ranges = static.ranges(before, text)
    found = static.quantise(product(weight, bias), ranges)
    zero = next(numpy_helper.to_array(t) for t in found.graph.initializer if t.name.endswith("_zero"))
    assert zero == pytest.approx(255 / 4, abs=2)
    a, b = logits(before, text)[0], logits(found, text)[0]
    assert 0 < np.abs(a - b).max() < 0.02 * np.abs(a).max()


def test_an_add_of_something_else_stays(texts: list[list[int]]) -> None:
    model = product(np.eye(16, dtype=np.float32))
    model.graph.node[-1].output[0] = "y"
    model.graph.node.append(helper.make_node("Add", ["y", "x"], ["logits"]))
    found = static.quantise(model, {"x": (-1.0, 3.0)})
    assert kinds(found)[-1] == "Add"
    assert np.isfinite(logits(found, [[1, 2, 3]])[0]).all()


def test_seven_bits_stay_within_63() -> None:
    weight = np.random.default_rng(2).normal(size=(64, 8)).astype(np.float32)
    found = static.quantise(product(weight), {"x": (-1.0, 3.0)}, bits=7)
    values = next(numpy_helper.to_array(t) for t in found.graph.initializer if t.data_type == TensorProto.INT8)
    assert np.abs(values).max() == 63


def test_values_that_are_all_zero_are_no_division_by_zero() -> None:
    found = static.quantise(product(np.ones((4, 8), np.float32)), {"x": (0.0, 0.0)})
    assert np.isfinite(logits(found, [[1, 2]])[0]).all()
