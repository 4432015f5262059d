"""The linear layers of an exported graph, and how their constants are looked at and changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from llmo.compression.graph import weights


@dataclass(frozen=True, slots=True)
class Layer:
    """`source @ weight = output`: names of values in the graph, the weight `[in, out]` a constant at fp32.

    `name` is for people: the module's in the model folder where its bias tells, else the output's. What names layers
    to other functions is `output`, which no rewrite of other layers changes.
    """

    name: str
    source: str
    weight: str
    output: str


def linear_layers(graph: onnx.GraphProto) -> list[Layer]:
    """In the order in which they are computed. Answer layers, which the exporter writes as Gemm, are not among them."""
    constant = weights(graph)
    biases = {
        value: bias
        for node in graph.node
        if node.op_type == "Add"
        for value, bias in (tuple(node.input), tuple(node.input)[::-1])
        if bias in constant
    }
    shared = Counter(biases.values())
    return [
        Layer(
            _name(biases.get(node.output[0], ""), shared, node.output[0]), node.input[0], node.input[1], node.output[0]
        )
        for node in graph.node
        if node.op_type == "MatMul" and _is_matrix(constant.get(node.input[1]))
    ]


def users(graph: onnx.GraphProto, value: str) -> list[onnx.NodeProto]:
    """The nodes that read a value."""
    return [node for node in graph.node if value in node.input]


def array_of(graph: onnx.GraphProto, name: str) -> NDArray[np.float32]:
    """A constant of the graph."""
    array: NDArray[np.float32] = numpy_helper.to_array(weights(graph)[name])
    return array


def give(graph: onnx.GraphProto, node: onnx.NodeProto, place: int, array: NDArray[np.float32]) -> None:
    """Let one input of a node be another constant: under the same name, or a new one if others share the old."""
    name = node.input[place]
    old = weights(graph)[name]
    if sum(list(one.input).count(name) for one in graph.node) > 1:
        name = f"{node.output[0]}_input{place}"
        old = graph.initializer.add()
    old.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))
    node.input[place] = name


def _is_matrix(tensor: onnx.TensorProto | None) -> bool:
    return tensor is not None and len(tensor.dims) == 2 and tensor.data_type == onnx.TensorProto.FLOAT


def _name(bias: str, shared: Counter[str], output: str) -> str:
    """The exporter shares equal constants: the name of one that several layers add says nothing."""
    return bias.removesuffix(".bias").removeprefix("model.") if shared[bias] == 1 and bias.endswith(".bias") else output
