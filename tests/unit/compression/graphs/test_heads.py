"""Heads that say nothing are cut, and nothing changes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from llmo.compression.graph import producers, weights
from llmo.compression.graphs import heads
from llmo.compression.graphs.calibration import logits

SIZE = 16  # of a head; two a layer


def attentions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "MultiHeadAttention"]


def zero(model: onnx.ModelProto, name: str, *, rows: slice = slice(None), columns: slice = slice(None)) -> None:
    tensor = weights(model.graph)[name]
    array = numpy_helper.to_array(tensor).copy()
    array[(rows, columns) if array.ndim == 2 else columns] = 0
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def silence_output(model: onnx.ModelProto, layer: int, part: slice) -> None:
    """The output layer reads nothing of these channels."""
    attention = attentions(model)[layer]
    reader = next(node for node in model.graph.node if attention.output[0] in node.input)
    zero(model, reader.input[1], rows=part)


def silence_values(model: onnx.ModelProto, layer: int, part: slice, *, bias: bool = True) -> None:
    add = producers(model.graph)[attentions(model)[layer].input[2]]
    zero(model, producers(model.graph)[add.input[0]].input[1], columns=part)
    if bias:
        zero(model, add.input[1], columns=part)


def counts(model: onnx.ModelProto) -> list[int]:
    return [next(a.i for a in node.attribute if a.name == "num_heads") for node in attentions(model)]


@pytest.mark.parametrize("how", [silence_output, silence_values])
def test_a_silent_head_is_cut_and_the_answers_stay(how: object, model: onnx.ModelProto, texts: list[list[int]]) -> None:
    assert callable(how)
    how(model, 0, slice(0, SIZE))
    before, size = logits(model, texts), model.ByteSize()
    assert heads.cut(model) == 1
    assert counts(model) == [1, 2]
    assert np.abs(np.stack(before) - np.stack(logits(model, texts))).max() < 1e-5
    assert size - model.ByteSize() > 4 * SIZE * 32 * 4 * 0.9  # a half of four matrices


def test_heads_that_speak_stay(model: onnx.ModelProto) -> None:
    silence_values(model, 1, slice(SIZE, 2 * SIZE), bias=False)  # the bias still speaks
    silence_output(model, 0, slice(3, 3 + SIZE))  # half of each head
    before = model.SerializeToString()
    assert heads.cut(model) == 0
    assert counts(model) == [2, 2]
    assert len(model.SerializeToString()) == len(before)


def test_one_head_stays_where_none_speaks(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    silence_output(model, 1, slice(None))
    before = logits(model, texts)
    assert heads.cut(model) == 1
    assert counts(model) == [2, 1]
    assert np.abs(np.stack(before) - np.stack(logits(model, texts))).max() < 1e-5
