"""The variants of an encoder: engines and precisions, each a folder of its own made from the saved model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from llmo.compression import native
from llmo.compression.export import export
from llmo.compression.quantise import measured_bits, parameter_count, quantise, safe_bits
from llmo.engines.native.encoder_model import FILE as NATIVE
from llmo.engines.onnx import GRAPH

WEIGHTS = "model.safetensors"
FP32_BITS = 32.0


@dataclass(slots=True)
class Source:
    """What variants are made from: the saved model, and what several of them share. `work` is for scratch files;
    `calibration` are texts of the training split, as token ids."""

    model: Path
    work: Path
    calibration: Callable[[], Sequence[Sequence[int]]]
    attention: str = field(default="", init=False)

    def graph(self) -> onnx.ModelProto:
        """The model as ONNX at fp32, to be changed at will."""
        file = self.work / GRAPH
        if not file.exists():
            self.attention = export(self.model, file)
        return onnx.load(file)


@dataclass(frozen=True, slots=True)
class Variant:
    """`build(source, folder)` writes the engine's own `files` into the folder and returns the bits of a weight."""

    engine: str
    precision: str
    files: tuple[str, ...]
    build: Callable[[Source, Path], float]


def _onnx(change: Callable[[onnx.ModelProto, Source], onnx.ModelProto]) -> Callable[[Source, Path], float]:
    def build(source: Source, folder: Path) -> float:
        graph = source.graph()
        parameters = parameter_count(graph)
        changed = change(graph, source)
        onnx.save(changed, folder / GRAPH)
        return measured_bits(changed, parameters)

    return build


def _native(source: Source, folder: Path) -> float:
    return native.write(source.model, folder).bits


VARIANTS: Mapping[str, Variant] = {
    "native-int8": Variant("native", "int8", (NATIVE,), _native),
    "onnx-fp32": Variant("onnx", "fp32", (GRAPH,), _onnx(lambda graph, source: graph)),
    "onnx-int8": Variant("onnx", "int8", (GRAPH,), _onnx(lambda graph, source: quantise(graph, bits=safe_bits()))),
}
