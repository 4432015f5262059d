"""int8 by weight: linear layers with one scale an output channel and activations with one scale a token.

ONNX Runtime's own dynamic quantisation takes one scale for a whole batch of activations, so an answer depends on
the texts that happen to share its batch. Here every token has its own scale: an answer is the same alone and in
any batch, and the error is smaller. Embedding tables keep one scale a row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from llmo.compression.graph import add_domain, weights
from llmo.hardware import processor

MICROSOFT = "com.microsoft"
SMALLEST_TABLE = 1 << 16  # weights; smaller tables save nothing worth their error
TINY = 1e-10  # keeps the scale of an all-zero row above zero


def quantise(model: onnx.ModelProto, *, bits: int = 8) -> onnx.ModelProto:
    """Changes the graph in place. `bits` is 7 where the CPU would overflow on 8 (see `safe_bits`), else 8.

    MatMul with constant weights `[in, out]` and Gather from large tables are quantised; the head (Gemm),
    normalisation and attention stay at fp32.
    """
    graph = model.graph
    rewrite = _Rewrite(graph, bits)
    nodes = [new for node in graph.node for new in rewrite.replacement(node)]
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    add_domain(model, MICROSOFT, 1)
    return model


def safe_bits(root: Path = Path("/")) -> int:
    """7 on x86 without VNNI, whose 16-bit sums of 8-bit products overflow; 8 everywhere else."""
    features = set(processor(root).features)
    return 7 if "avx2" in features and not {"avx512_vnni", "avx_vnni", "amx_int8"} & features else 8


def measured_bits(model: onnx.ModelProto, parameters: int) -> float:
    """Bits a weight: what all weight tensors, scales included, take in the file, over the number of parameters."""
    return 8 * sum(_size(tensor) for tensor in _weight_tensors(model)) / parameters


def parameter_count(model: onnx.ModelProto) -> int:
    """How many weights a graph at fp32 holds."""
    return sum(int(np.prod(tensor.dims)) for tensor in _weight_tensors(model))


def _weight_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    return [tensor for tensor in model.graph.initializer if tensor.data_type in kinds]


def _size(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


class _Rewrite:
    """One pass over a graph's nodes; activations that feed several layers are quantised once."""

    def __init__(self, graph: onnx.GraphProto, bits: int) -> None:
        self._graph = graph
        self._weights = weights(graph)
        self._limit = 2 ** (bits - 1) - 1
        self._activations: dict[str, tuple[str, str]] = {}
        self._made: set[str] = set()

    def replacement(self, node: NodeProto) -> list[NodeProto]:
        if node.op_type == "MatMul" and self._is_table(node.input[1]):
            return self._linear(node)
        if node.op_type == "Gather" and self._is_table(node.input[0], SMALLEST_TABLE):
            return self._lookup(node)
        return [node]

    def _is_table(self, name: str, smallest: int = 0) -> bool:
        tensor = self._weights.get(name)
        return (
            tensor is not None
            and tensor.data_type == onnx.TensorProto.FLOAT
            and len(tensor.dims) == 2
            and int(np.prod(tensor.dims)) >= smallest
        )

    def _linear(self, node: NodeProto) -> list[NodeProto]:
        """`x @ w` as `token scale * (int8(x) @ int8(w)) * channel scale`."""
        source, weight = node.input
        before, (quantised, scale) = self._quantised_activation(source)
        values, scales = self._quantised_weight(weight, axis=0)
        zero, one = self._constant("llmo_zero_point", np.uint8(128)), self._constant("llmo_one", np.float32(1))
        product = node.output[0] + "_unscaled"
        return [
            *before,
            helper.make_node(
                "MatMulIntegerToFloat", [quantised, values, one, scales, zero], [product], domain=MICROSOFT
            ),
            helper.make_node("Mul", [product, scale], list(node.output)),
        ]

    def _quantised_activation(self, source: str) -> tuple[list[NodeProto], tuple[str, str]]:
        """Nodes that make uint8 values around 128 and their scale `[batch, length, 1]`."""
        if source in self._activations:
            return [], self._activations[source]
        axis = self._constant("llmo_last_axis", np.array([-1], dtype=np.int64))
        per_step = self._constant("llmo_per_step", np.float32(1 / 127))
        tiny, one = self._constant("llmo_tiny", np.float32(TINY)), self._constant("llmo_one", np.float32(1))
        zero = self._constant("llmo_zero_point", np.uint8(128))
        name = {k: f"{source}_{k}" for k in ("max", "min", "neg", "abs", "step", "scale", "inverse", "steps", "uint8")}
        nodes = [
            helper.make_node("ReduceMax", [source, axis], [name["max"]], keepdims=1),
            helper.make_node("ReduceMin", [source, axis], [name["min"]], keepdims=1),
            helper.make_node("Neg", [name["min"]], [name["neg"]]),
            helper.make_node("Max", [name["max"], name["neg"]], [name["abs"]]),
            helper.make_node("Mul", [name["abs"], per_step], [name["step"]]),
            helper.make_node("Max", [name["step"], tiny], [name["scale"]]),
            helper.make_node("Reciprocal", [name["scale"]], [name["inverse"]]),
            helper.make_node("Mul", [source, name["inverse"]], [name["steps"]]),
            helper.make_node("QuantizeLinear", [name["steps"], one, zero], [name["uint8"]]),
        ]
        self._activations[source] = name["uint8"], name["scale"]
        return nodes, self._activations[source]

    def _lookup(self, node: NodeProto) -> list[NodeProto]:
        """A row of the table as `row scale * int8 row`."""
        values, scales = self._quantised_weight(node.input[0], axis=1)
        name = {k: f"{node.output[0]}_{k}" for k in ("row", "float", "scale")}
        return [
            helper.make_node("Gather", [values, node.input[1]], [name["row"]], axis=0),
            helper.make_node("Cast", [name["row"]], [name["float"]], to=onnx.TensorProto.FLOAT),
            helper.make_node("Gather", [scales, node.input[1]], [name["scale"]], axis=0),
            helper.make_node("Mul", [name["float"], name["scale"]], list(node.output)),
        ]

    def _quantised_weight(self, name: str, axis: int) -> tuple[str, str]:
        """int8 values and fp32 scales: `[out]` for a linear layer (axis 0), `[rows, 1]` for a table (axis 1)."""
        array = numpy_helper.to_array(self._weights[name])
        scales = np.maximum(np.abs(array).max(axis=axis, keepdims=True), TINY).astype(np.float32) / self._limit
        values = np.clip(np.round(array / scales), -self._limit, self._limit).astype(np.int8)
        shaped = scales.reshape(-1) if axis == 0 else scales
        return self._constant(f"{name}_int8", values), self._constant(f"{name}_scale", shaped)

    def _constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        if name not in self._made:
            self._made.add(name)
            self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        return name
