"""Mixed precision: which layers of a graph a quantisation hurts, measured one at a time, and which to spare."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from llmo.compression.graphs.calibration import Ids, logits
from llmo.compression.graphs.layers import Layer, linear_layers
from llmo.errors import GateRefused
from llmo.tasks.base import Logits

Quantiser = Callable[[onnx.ModelProto, Collection[str]], onnx.ModelProto]
Distance = Callable[[Sequence[Logits], Sequence[Logits]], float]
SMALLEST = 1e-12


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Layers that read one activation, and how far the answers move when they alone are quantised."""

    layers: tuple[Layer, ...]
    distance: float

    @property
    def outputs(self) -> set[str]:
        return {layer.output for layer in self.layers}


@dataclass(frozen=True, slots=True)
class Kept:
    """`layers` to spare, and the evidence: `table`, the most sensitive first; the distance with all layers quantised,
    and without the spared ones."""

    layers: list[Layer]
    table: list[Sensitivity]
    distance_all: float
    distance: float

    @property
    def outputs(self) -> set[str]:
        """As `keep` of the quantisers takes them."""
        return {layer.output for layer in self.layers}


def divergence(before: Sequence[Logits], after: Sequence[Logits]) -> float:
    """Mean Kullback-Leibler divergence of the class probabilities (softmax over the last axis), in nats.

    Calibration texts are the model's training texts, of which it is so sure that it says ten times less than on others.
    """
    found = []
    for a, b in zip(before, after, strict=True):
        p, q = _log_softmax(a), _log_softmax(b)
        found.append(float((np.exp(p) * (p - q)).sum(axis=-1).mean()))
    return float(np.mean(found))


def relative_error(before: Sequence[Logits], after: Sequence[Logits]) -> float:
    """Root mean square change of the outputs over their own root mean square; for tasks without classes too."""
    change = sum(float(((b - a) ** 2).sum()) for a, b in zip(before, after, strict=True))
    return float(np.sqrt(change / max(sum(float((a**2).sum()) for a in before), SMALLEST)))


def keep(
    model: onnx.ModelProto,
    calibration: Sequence[Ids],
    target: float,
    quantise: Quantiser,
    *,
    distance: Distance = relative_error,
    cores: int = 1,
) -> Kept:
    """The fewest of the most sensitive layers to leave out of `quantise` so that the answers to the calibration texts
    move by at most `target`, in the unit of `distance`. The graph is not changed.

    `quantise(model, outputs)` quantises a graph but for the layers whose outputs are named. Layers that read one
    activation are left out together, for it is rounded once for all of them. Takes one pass over the texts a group,
    if the target is missed at all, and as many more as it takes to halve their number down to one.
    Raises GateRefused when the target is missed even with every layer spared.
    """
    layers = linear_layers(model.graph)
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        groups.setdefault(layer.source, []).append(layer)
    expected = logits(model, calibration, cores=cores)

    def moved(outputs: Collection[str]) -> float:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return distance(expected, logits(quantise(copy, outputs), calibration, cores=cores))

    every = {layer.output for layer in layers}
    whole = moved(())
    if whole <= target:
        return Kept([], [], whole, whole)
    rest = moved(every)
    if rest > target:
        raise GateRefused(
            f"with no linear layer quantised the answers still move by {rest:.2g} (at most {target:g} is allowed)",
            hint="allow more, or leave the tables at fp32 too",
        )
    table = [Sensitivity(tuple(group), moved(every - {layer.output for layer in group})) for group in groups.values()]
    table.sort(key=lambda found: -found.distance)
    enough, found, too_few = len(table), rest, 0
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        tried = moved(set().union(*(one.outputs for one in table[:middle])))
        if tried <= target:
            enough, found = middle, tried
        else:
            too_few = middle
    return Kept([layer for one in table[:enough] for layer in one.layers], table, whole, found)


def _log_softmax(array: Logits) -> Logits:
    shifted = array - array.max(axis=-1, keepdims=True)
    found: Logits = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found
