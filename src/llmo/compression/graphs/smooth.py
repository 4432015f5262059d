"""Outlier channels of activations moved into the weights that read them, so that one scale fits all channels.

The method is SmoothQuant (Xiao et al. 2023, arXiv:2211.10438): channel j of an activation is divided by
`s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)` and row j of the weights multiplied by it; the product stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, helper, numpy_helper

from llmo.compression.graph import ATTENTION, drop_unused, producers, weights
from llmo.compression.graphs.calibration import Ids, activations
from llmo.compression.graphs.layers import Layer, array_of, give, linear_layers, users
from llmo.compression.graphs.static import OUTSIDE
from llmo.compression.quantise import rounded

Array = NDArray[np.float32]
Place = Literal["norm", "values", "product"]
ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
WORTH = 0.9  # of the error without it: what is gained must pay for a product in the graph
ROWS = 512  # tokens on which errors are compared
SMALLEST = 1e-5


@dataclass(frozen=True, slots=True)
class Smoothed:
    """Layers that read one activation. `error`: of their int8 product, relative, without and with smoothing.

    `place`: where the division went: into the "norm" before, into the weights of the attention's "values", or a
    "product" of its own, where something else reads the activation too; None where it was not worth it.
    """

    layers: tuple[str, ...]
    alpha: float
    before: float
    after: float
    place: Place | None


def rescale(
    model: onnx.ModelProto, calibration: Sequence[Ids], alpha: float | None = None, *, cores: int = 1
) -> list[Smoothed]:
    """Changes the fp32 graph in place, before it is quantised; what it computes stays the same within rounding.

    Inputs of linear layers that come from a LayerNormalization or from the attention are smoothed, each with the
    `alpha` of `ALPHAS` that gives the smallest error of the int8 product on the calibration texts, or with the one
    given. What Gelu makes is left alone: nothing before it can take the division, and it has many channels.
    """
    graph = model.graph
    made_by = producers(graph)
    groups: dict[str, list[Layer]] = {}
    for layer in linear_layers(graph):
        if (maker := made_by.get(layer.source)) is not None and maker.op_type in ("LayerNormalization", ATTENTION):
            groups.setdefault(layer.source, []).append(layer)
    sample = _sample(model, list(groups), calibration, cores)
    report = []
    for source, layers in groups.items():
        weight = np.concatenate([array_of(graph, layer.weight) for layer in layers], axis=1)
        rows, largest = sample[source]
        before = _error(rows, weight, None)
        tried = {a: _scales(largest, weight, a) for a in (ALPHAS if alpha is None else (alpha,))}
        errors = {a: _error(rows, weight, scales) for a, scales in tried.items()}
        best = min(errors, key=lambda a: errors[a])
        worth = alpha is not None or errors[best] < WORTH * before
        place = _divide(graph, made_by[source], layers, tried[best]) if worth else None
        names = tuple(layer.name for layer in layers)
        report.append(Smoothed(names, best, before, errors[best] if place else before, place))
    drop_unused(graph)
    return report


def _sample(
    model: onnx.ModelProto, names: Sequence[str], calibration: Sequence[Ids], cores: int
) -> dict[str, tuple[Array, Array]]:
    """`ROWS` tokens of each activation, spread over the texts, and the largest absolute value of each channel."""
    each = max(1, ROWS // len(calibration))
    rows: dict[str, list[Array]] = {name: [] for name in names}
    largest: dict[str, Array] = {}
    for found in activations(model, names, calibration, cores=cores):
        for name, values in found.items():
            rows[name].append(values[np.linspace(0, len(values) - 1, each).astype(int)])
            own = np.abs(values).max(axis=0)
            largest[name] = np.maximum(largest[name], own) if name in largest else own
    return {name: (np.concatenate(rows[name]), largest[name]) for name in names}


def _scales(largest: Array, weight: Array, alpha: float) -> Array:
    """About 1 in the middle, so that what is small stays well above the smallest floats."""
    reach, rows = np.maximum(largest, SMALLEST), np.maximum(np.abs(weight).max(axis=1), SMALLEST)
    scales = reach**alpha / rows ** (1 - alpha)
    found: Array = (scales / np.median(scales)).astype(np.float32)
    return found


def _error(rows: Array, weight: Array, scales: Array | None) -> float:
    """Root mean square error of the product, both sides at int8 as `static` has them, over that of the product."""
    exact = rows @ weight
    if scales is not None:
        rows, weight = rows / scales, weight * scales[:, None]
    low, high = np.quantile(rows, (OUTSIDE, 1 - OUTSIDE))
    step = max(float(high - low) / 255, SMALLEST**2)
    zero = round(-float(low) / step)
    steps = np.clip(np.round(rows / step) + zero, 0, 255) - zero
    values, channel = rounded(weight, 0, 127)
    found = (steps.astype(np.float32) @ values.astype(np.float32)) * (channel * np.float32(step))
    return float(np.sqrt(np.mean((found - exact) ** 2) / max(float(np.mean(exact**2)), SMALLEST**2)))


def _divide(graph: onnx.GraphProto, maker: NodeProto, layers: Sequence[Layer], scales: Array) -> Place | None:
    """Divide the activation and multiply the weights that read it. None: the attention's values take no division."""
    products = {layer.output for layer in layers}
    source = layers[0].source
    alone = {node.output[0] for node in users(graph, source)} == products and not _is_output(graph, source)
    if maker.op_type == ATTENTION:
        if not (alone and _divide_values(graph, maker, scales)):
            return None
        place: Place = "values"
    elif alone:
        for number in range(1, len(maker.input)):
            give(graph, maker, number, array_of(graph, maker.input[number]) / scales)
        place = "norm"
    else:
        _insert_product(graph, maker, products, scales)
        place = "product"
    for node in graph.node:
        if node.output[0] in products:
            give(graph, node, 1, array_of(graph, node.input[1]) * scales[:, None])
    return place


def _divide_values(graph: onnx.GraphProto, attention: NodeProto, scales: Array) -> bool:
    """Attention mixes tokens and never channels, so the layer that makes its values can divide for it."""
    made_by = producers(graph)
    add = made_by.get(attention.input[2])
    product = made_by.get(add.input[0]) if add is not None and add.op_type == "Add" else add
    constant = weights(graph)
    if add is None or product is None or product.op_type != "MatMul":
        return False
    if any(node.input[1] not in constant for node in (add, product)):
        return False
    if any(len(users(graph, node.output[0])) != 1 for node in (add, product)) or len(scales) != _width(graph, product):
        return False
    give(graph, product, 1, array_of(graph, product.input[1]) / scales)
    if add is not product:
        give(graph, add, 1, array_of(graph, add.input[1]) / scales)
    return True


def _width(graph: onnx.GraphProto, product: NodeProto) -> int:
    return int(array_of(graph, product.input[1]).shape[1])


def _insert_product(graph: onnx.GraphProto, maker: NodeProto, products: set[str], scales: Array) -> None:
    name = f"{maker.output[0]}_smooth"
    graph.initializer.append(numpy_helper.from_array(1 / scales, f"{name}_factor"))
    for node in graph.node:
        if node.output[0] in products:
            node.input[0] = name
    place = next(i for i, node in enumerate(graph.node) if node.output[0] == maker.output[0])
    graph.node.insert(place + 1, helper.make_node("Mul", [maker.output[0], f"{name}_factor"], [name]))


def _is_output(graph: onnx.GraphProto, name: str) -> bool:
    return any(value.name == name for value in graph.output)
