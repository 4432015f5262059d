"""Static int8: one scale an activation, found on calibration texts, so that nothing is measured while answering.

Written as MatMulIntegerToFloat with its bias inside: ONNX Runtime runs that a tenth faster than the same quantisation
spelt as QuantizeLinear and DequantizeLinear around a MatMul, which it fuses only in part.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from llmo.compression.graph import add_domain, drop_unused, weights
from llmo.compression.graphs.calibration import Ids, activations
from llmo.compression.graphs.layers import Layer, array_of, linear_layers, users
from llmo.compression.quantise import MICROSOFT, TINY, rounded

Ranges = Mapping[str, tuple[float, float]]
OUTSIDE = 1e-5  # share of an activation's values that may lie beyond its range, at either end
LEVELS = 255


def ranges(
    model: onnx.ModelProto, calibration: Sequence[Ids], *, outside: float = OUTSIDE, cores: int = 1
) -> dict[str, tuple[float, float]]:
    """The lower and the upper end of what each linear layer reads, by the name of that value in the graph.

    A share `outside` of the values may be beyond either end: single outliers would otherwise set the scale of all.
    """
    names = list(dict.fromkeys(layer.source for layer in linear_layers(model.graph)))
    tokens = sum(len(ids) for ids in calibration)
    tails: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    for found in activations(model, names, calibration, cores=cores):
        for name, values in found.items():
            count = 1 + int(outside * tokens * values.shape[1])
            low, high = tails.get(name, (np.empty(0, np.float32), np.empty(0, np.float32)))
            tails[name] = _smallest(low, values, count), -_smallest(-high, -values, count)
    return {name: (float(low.max()), float(high.min())) for name, (low, high) in tails.items()}


def quantise(model: onnx.ModelProto, found: Ranges, *, bits: int = 8, keep: Collection[str] = ()) -> onnx.ModelProto:
    """Changes the graph in place: every linear layer whose source has a range, but for the outputs named in `keep`.

    Weights have one scale an output channel; `bits` as for `compression.quantise`, which is what to run after this: it
    does the layers that were kept, with a scale a token, and the tables.
    """
    graph = model.graph
    rewrite = _Rewrite(graph, found, 2 ** (bits - 1) - 1)
    layers = {
        layer.output: layer for layer in linear_layers(graph) if layer.source in found and layer.output not in keep
    }
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes += rewrite.product(layers[node.output[0]]) if node.output[0] in layers else [node]
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.output[0] not in rewrite.added or node.op_type != "Add")
    drop_unused(graph)
    add_domain(model, MICROSOFT, 1)
    return model


def _smallest(kept: NDArray[np.float32], values: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    together = np.concatenate([kept, values.ravel()])
    return together if len(together) <= count else np.partition(together, count - 1)[:count]


class _Rewrite:
    """One pass over a graph's nodes; what feeds several layers is quantised once. `added`: Adds done by products."""

    def __init__(self, graph: onnx.GraphProto, found: Ranges, limit: int) -> None:
        self._graph = graph
        self._found = found
        self._limit = limit
        self._weights = weights(graph)
        self._quantised: set[str] = set()
        self.added: set[str] = set()

    def product(self, layer: Layer) -> list[NodeProto]:
        before = [] if layer.source in self._quantised else [self._source(layer.source)]
        values, scales = rounded(array_of(self._graph, layer.weight), 0, self._limit)
        inputs = [
            f"{layer.source}_static",
            self._constant(f"{layer.output}_int8", values),
            f"{layer.source}_static_scale",
            self._constant(f"{layer.output}_scale", scales.reshape(-1)),
            f"{layer.source}_static_zero",
        ]
        output = layer.output
        after = users(self._graph, output)
        if len(after) == 1 and after[0].op_type == "Add" and (bias := self._bias(after[0], output)) is not None:
            inputs += ["", self._constant(f"{output}_bias", bias)]
            output = after[0].output[0]
            self.added.add(output)
        return [*before, helper.make_node("MatMulIntegerToFloat", inputs, [output], domain=MICROSOFT)]

    def _source(self, name: str) -> NodeProto:
        """Zero is always a level, as zeros must stay what they are."""
        self._quantised.add(name)
        low, high = min(self._found[name][0], 0.0), max(self._found[name][1], 0.0)
        scale = np.float32(max((high - low) / LEVELS, TINY))
        zero = np.uint8(np.clip(round(-low / float(scale)), 0, LEVELS))
        inputs = [name, self._constant(f"{name}_static_scale", scale), self._constant(f"{name}_static_zero", zero)]
        return helper.make_node("QuantizeLinear", inputs, [f"{name}_static"])

    def _bias(self, add: NodeProto, output: str) -> NDArray[np.float32] | None:
        """The constant that an Add adds to every token, or None if it adds something else."""
        other = add.input[1] if add.input[0] == output else add.input[0]
        tensor = self._weights.get(other)
        if tensor is None or not tensor.dims or int(np.prod(tensor.dims)) != tensor.dims[-1]:
            return None
        return array_of(self._graph, other).reshape(-1)

    def _constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name
