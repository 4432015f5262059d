"""Attention heads that say nothing, as structured pruning leaves them, cut out of the graph."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto

from llmo.compression.graph import ATTENTION, drop_unused, producers, weights
from llmo.compression.graphs.layers import array_of, give, users

Array = NDArray[np.float32]
QUERY, KEY, VALUE = range(3)


def cut(model: onnx.ModelProto) -> int:
    """Changes the fp32 graph in place and returns how many heads it cut; what it computes stays the same.

    A head says nothing when the output layer's weights for it, or the weights and the bias of its values, are zero.
    The last head of an attention stays: a node has at least one.
    """
    found = sum(_cut(model.graph, node) for node in model.graph.node if node.op_type == ATTENTION)
    drop_unused(model.graph)
    return found


def _cut(graph: onnx.GraphProto, attention: NodeProto) -> int:
    sides = [_layer(graph, attention.input[place]) for place in (QUERY, KEY, VALUE)]
    layers = [layer for layer in sides if layer is not None]
    readers = users(graph, attention.output[0])
    attribute = next(a for a in attention.attribute if a.name == "num_heads")
    if len(layers) < len(sides) or len(readers) != 1 or not _has_constant(graph, readers[0]):
        return 0
    heads, output = int(attribute.i), readers[0]
    product, add = layers[VALUE]
    unread = _silent(array_of(graph, output.input[1]).T, heads)
    unsaid = _silent(array_of(graph, product.input[1]), heads)
    if add is not None:
        unsaid &= _silent(array_of(graph, add.input[1])[None], heads)
    kept = np.flatnonzero(~(unread | unsaid))
    if not len(kept):
        kept = np.array([0])
    if len(kept) == heads:
        return 0
    for layer in layers:
        for node in filter(None, layer):
            give(graph, node, 1, _columns(array_of(graph, node.input[1]), heads, kept))
    give(graph, output, 1, _columns(array_of(graph, output.input[1]).T, heads, kept).T)
    attribute.i = len(kept)
    return heads - len(kept)


def _layer(graph: onnx.GraphProto, value: str) -> tuple[NodeProto, NodeProto | None] | None:
    """The product that makes a value, and the Add of its bias if it has one; None unless nothing else reads them."""
    made_by = producers(graph)
    node = made_by.get(value)
    add = None
    if node is not None and node.op_type == "Add" and node.input[1] in weights(graph):
        node, add = made_by.get(node.input[0]), node
    if node is None or not _has_constant(graph, node):
        return None
    alone = all(len(users(graph, part.output[0])) == 1 for part in (node, add) if part is not None)
    return (node, add) if alone else None


def _has_constant(graph: onnx.GraphProto, node: NodeProto) -> bool:
    return node.op_type == "MatMul" and node.input[1] in weights(graph)


def _silent(columns: Array, heads: int) -> NDArray[np.bool_]:
    """Which heads have only zeros in `[rows, heads * size]`."""
    silent: NDArray[np.bool_] = np.logical_not(columns.reshape(len(columns), heads, -1).any(axis=(0, 2)))
    return silent


def _columns(array: Array, heads: int, kept: NDArray[np.int64]) -> Array:
    """The last axis, `heads * size`, of the heads that are kept."""
    apart = array.reshape(*array.shape[:-1], heads, -1)
    taken: Array = apart[..., kept, :].reshape(*array.shape[:-1], -1)
    return taken
