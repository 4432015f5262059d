"""The variants of an encoder: engines and precisions, each a folder of its own made from the saved model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import onnx

from llmo.compression import native, torch_encoder
from llmo.compression.export import export
from llmo.compression.graphs import attention, default, heads, lean, smooth, static
from llmo.compression.quantise import measured_bits, parameter_count, quantise, safe_bits
from llmo.engines.native.encoder_model import FILE as NATIVE
from llmo.engines.onnx import GRAPH
from llmo.errors import needing

WEIGHTS, PLAIN = "model.safetensors", "plain.onnx"
OPENVINO = ("openvino_model.xml", "openvino_model.bin")
FP32_BITS = 32.0


@dataclass(slots=True)
class Source:
    """What variants are made from: the saved model, and what several of them share. `work` is for scratch files;
    `calibration` are texts of the training split, as token ids."""

    model: Path
    work: Path
    calibration: Callable[[], Sequence[Sequence[int]]]
    attention: str = field(default="", init=False)

    def fused(self) -> Path:
        """The model as an ONNX file at fp32."""
        file = self.work / GRAPH
        if not file.exists():
            self.attention = export(self.model, file)
        return file

    def graph(self) -> onnx.ModelProto:
        """The same, to be changed at will."""
        return onnx.load(self.fused())

    def plain(self) -> Path:
        """The same with attention as transformers spells it."""
        file = self.work / PLAIN
        if not file.exists():
            export(self.model, file, fused=False)
        return file


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


def _by_token(graph: onnx.ModelProto, source: Source) -> onnx.ModelProto:
    """int8 with a scale for each token."""
    heads.cut(graph)
    lean.lean(graph)
    return attention.spell(quantise(graph, bits=safe_bits()))


def _static(graph: onnx.ModelProto, source: Source) -> onnx.ModelProto:
    """int8 with scales that calibration found, after outliers were moved into the weights."""
    texts = source.calibration()
    heads.cut(graph)
    lean.lean(graph)
    smooth.rescale(graph, texts)
    quantised = static.quantise(graph, static.ranges(graph, texts), bits=safe_bits())
    return attention.spell(quantise(quantised, bits=safe_bits()))


def _default(source: Source, folder: Path) -> float:
    """ONNX Runtime's own int8 as its default makes it."""
    graph = source.graph()
    parameters = parameter_count(graph)
    default.quantise(source.plain(), folder / GRAPH)
    return measured_bits(onnx.load(folder / GRAPH), parameters)


def _native(source: Source, folder: Path) -> float:
    return native.write(source.model, folder)


def _torch(source: Source, folder: Path) -> float:
    return torch_encoder.write(source.model, folder)


def _openvino(precision: Literal["bf16", "int8"]) -> Callable[[Source, Path], float]:
    def build(source: Source, folder: Path) -> float:
        with needing(f"openvino at {precision}", "openvino" if precision == "bf16" else "calibrate"):
            from llmo.compression.openvino_encoder import write
        texts = source.calibration() if precision == "int8" else ()
        return write(source.fused(), folder, precision, texts).bits

    return build


VARIANTS: Mapping[str, Variant] = {
    "native-int8": Variant("native", "int8", (NATIVE,), _native),
    "onnx-fp32": Variant("onnx", "fp32", (GRAPH,), _onnx(lambda graph, source: graph)),
    "onnx-int8": Variant("onnx", "int8", (GRAPH,), _onnx(_by_token)),
    "onnx-int8-static": Variant("onnx", "int8", (GRAPH,), _onnx(_static)),
    "torch-bf16": Variant("torch", "bf16", (WEIGHTS,), _torch),
    "openvino-bf16": Variant("openvino", "bf16", OPENVINO, _openvino("bf16")),
    "openvino-int8": Variant("openvino", "int8", OPENVINO, _openvino("int8")),
    "onnx-int8-default": Variant("onnx", "int8", (GRAPH,), _default),
}
