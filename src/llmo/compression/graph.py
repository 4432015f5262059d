"""Rewrites on ONNX graphs: what the exporter leaves behind is cut away until only the model's own work is left."""

from __future__ import annotations

import onnx

ATTENTION = "MultiHeadAttention"


def tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same function with named dimensions, no notes of the exporter and no needless reshapes; changed in place."""
    graph = model.graph
    _strip(model)
    for value in (*graph.input, *graph.output):
        for dimension, name in zip(value.type.tensor_type.shape.dim, ("batch", "length"), strict=False):
            if dimension.HasField("dim_param"):
                dimension.dim_param = name
    _drop_reshapes_around_attention(graph)
    drop_unused(graph)
    return model


def has_attention(model: onnx.ModelProto) -> bool:
    """Whether the model's attention is ONNX Runtime's own node."""
    return any(node.op_type == ATTENTION for node in model.graph.node)


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Which node makes each value."""
    return {output: node for node in graph.node for output in node.output}


def weights(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The initializers by name."""
    return {tensor.name: tensor for tensor in graph.initializer}


def _strip(model: onnx.ModelProto) -> None:
    del model.metadata_props[:]
    graph = model.graph
    del graph.value_info[:]
    del graph.metadata_props[:]
    for item in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


def _drop_reshapes_around_attention(graph: onnx.GraphProto) -> None:
    """transformers splits heads before the attention and joins them after; the fused node does both itself.

    Its inputs and output are `[batch, length, width]`, as the linear layers before and after it have them, so
    every Reshape in between is undone by another one.
    """
    made_by = producers(graph)
    for node in graph.node:
        if node.op_type != ATTENTION:
            continue
        for place in range(3):
            while made_by[node.input[place]].op_type == "Reshape":
                node.input[place] = made_by[node.input[place]].input[0]
        last = node.output[0]
        while len(after := [n for n in graph.node if last in n.input]) == 1 and after[0].op_type == "Reshape":
            last = after[0].output[0]
        if last != node.output[0]:
            _replace(graph, last, node.output[0])


def _replace(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == old:
                node.input[place] = new


def drop_unused(graph: onnx.GraphProto) -> None:
    """Take out nodes and constants that no output depends on."""
    while True:
        used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
        unused = [node for node in graph.node if used.isdisjoint(node.output)]
        if not unused:
            break
        for node in unused:
            graph.node.remove(node)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def add_domain(model: onnx.ModelProto, domain: str, version: int) -> None:
    """Say that nodes of a domain beyond ONNX's own are used."""
    if all(entry.domain != domain for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(domain, version))
