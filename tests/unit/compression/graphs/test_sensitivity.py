"""Mixed precision: the layer that hurts is found, and no more are spared than it takes."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
import pytest

from llmo.compression import quantise as dynamic
from llmo.compression.graphs import sensitivity, static
from llmo.compression.graphs.layers import array_of, give, linear_layers
from llmo.errors import GateRefused


def noisy(model: onnx.ModelProto, keep: Collection[str]) -> onnx.ModelProto:
    """A quantiser whose error is known: none, but for one layer of the feed-forward part, and a little in another."""
    for node in model.graph.node:
        for layer in linear_layers(model.graph):
            if node.output[0] == layer.output not in keep and "output.dense" in layer.name:
                error = 0.5 if "layer.1.output" in layer.name else 0.02 if "layer.0.output" in layer.name else 0
                weight = array_of(model.graph, layer.weight)
                give(model.graph, node, 1, weight * (1 + error * (-1) ** np.arange(len(weight)))[:, None].astype("f4"))
    return model


def test_the_layer_that_hurts_is_spared_and_no_other(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    before = model.SerializeToString()
    kept = sensitivity.keep(model, texts[:20], 0.005, noisy, distance=sensitivity.divergence)
    assert [layer.name for layer in kept.layers] == ["bert.encoder.layer.1.output.dense"]
    assert kept.distance <= 0.005 < kept.distance_all
    assert kept.table[0].layers == tuple(kept.layers)
    assert [one.distance for one in kept.table] == sorted((one.distance for one in kept.table), reverse=True)
    assert kept.table[1].layers[0].name == "bert.encoder.layer.0.output.dense"
    assert len(kept.table) == 2 * 4
    assert model.SerializeToString() == before


def test_nothing_is_spared_where_all_may_be_quantised(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    kept = sensitivity.keep(model, texts[:20], 1.0, lambda graph, keep: dynamic.quantise(graph, keep=keep))
    assert (kept.layers, kept.table) == ([], [])
    assert 0 < kept.distance == kept.distance_all


def test_a_stricter_target_spares_more(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    ranges = static.ranges(model, texts[:20], outside=0.01)  # far too narrow, so that every layer hurts

    def narrow(graph: onnx.ModelProto, keep: Collection[str]) -> onnx.ModelProto:
        return static.quantise(graph, ranges, keep=keep)

    found = [sensitivity.keep(model, texts[:20], share, narrow) for share in (0.1, 0.03, 0.0)]
    counts = [len(kept.layers) for kept in found]
    assert 0 < counts[0] < counts[1] < counts[2] == 2 * 6
    assert all(kept.distance <= share for kept, share in zip(found, (0.1, 0.03, 0.0), strict=True))


def test_a_target_out_of_reach_is_refused(model: onnx.ModelProto, texts: list[list[int]]) -> None:
    def ruin(graph: onnx.ModelProto, keep: Collection[str]) -> onnx.ModelProto:
        head = next(node for node in graph.graph.node if node.op_type == "Gemm")
        give(graph.graph, head, 1, array_of(graph.graph, head.input[1]) * np.float32(0.5))
        return graph

    with pytest.raises(GateRefused, match="with no linear layer quantised") as caught:
        sensitivity.keep(model, texts[:20], 1e-6, ruin)
    assert caught.value.exit_code == 3


def test_distances_are_what_they_say() -> None:
    before, after = [np.log(np.array([0.5, 0.5], "f4"))], [np.log(np.array([0.25, 0.75], "f4"))]
    assert sensitivity.divergence(before, before) == 0
    assert sensitivity.divergence(before, after) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3), rel=1e-5)
    tokens = [np.log(np.array([[0.5, 0.5], [0.25, 0.75]], "f4"))]
    assert sensitivity.divergence(tokens, [tokens[0][::-1]]) > 0
    assert sensitivity.relative_error([np.array([3.0, 4.0], "f4")], [np.array([3.0, 3.5], "f4")]) == pytest.approx(0.1)
