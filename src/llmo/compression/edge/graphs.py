"""Which graph an exported folder gets: the one that a model was compressed to, else one made from its weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmo.context import Context
from llmo.engines.onnx import GRAPH
from llmo.errors import ModelError, SpecError, needing
from llmo.tasks.card import reshaped

WEIGHTS = "model.safetensors"
PORTABLE_BITS = 7  # of weights at int8: nobody knows the processor, and with 8 sums overflow on x86 without VNNI
COPIED = "the very graph that the endpoint runs"
OPENVINO = ("openvino_model.xml", "openvino_model.bin")

Target = Literal["edge", "onnx", "openvino"]


@dataclass(frozen=True, slots=True)
class Source:
    """A model, the one it was compressed from if it was, and the model's card."""

    model: Path
    original: Path | None
    card: Mapping[str, Any]

    @property
    def weights(self) -> Path:
        """The folder that holds the weights as they were trained. Raises ModelError where there is none."""
        if reshaped(self.card):
            raise ModelError(
                f"the model is a smaller shape of another one, and only what runs it on {self.made_for} was kept",
                hint="compress for what you export to: llmo compress MODEL --set 'variants=[onnx-int8]'",
                where=str(self.model),
            )
        folder = self.original if "reference" in self.card else self.model
        if folder is None or not (folder / WEIGHTS).is_file():
            raise ModelError(
                f"the model was made for {self.made_for}, and its weights as they were trained are not in the store",
                hint="export the model that it was compressed from, or train it again",
                where=str(self.model),
            )
        return folder

    @property
    def made_for(self) -> str:
        """The engine and the precision that the card names."""
        return f"{self.card['engine']} {self.card['precision']}"


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: its precision, in a sentence what it was made of, and the model folder whose tokeniser,
    config and golden texts belong to it."""

    precision: str
    made_of: str
    beside: Path


def write(source: Source, target: Target, precision: str | None, folder: Path, ctx: Context) -> Written:
    """Write `model.onnx`, or `openvino_model.xml` and `.bin`, into `folder`.

    The graph that the model was compressed to is copied, unless another `precision` is asked for. Else the weights are
    exported at fp32, and brought to int8 only if asked. Raises SpecError for a precision that a target does not have
    and ModelError for a model that cannot be expressed.
    """
    if target == "openvino":
        return _openvino(source, precision, folder, ctx)
    own, beside = source.model / GRAPH, source.model
    stored = source.card["precision"] if source.card["engine"] == "onnx" and own.is_file() else None
    if stored is not None and precision in (None, stored):
        shutil.copyfile(own, folder / GRAPH)
        return Written(stored, COPIED, beside)
    if stored == "fp32":
        shutil.copyfile(own, folder / GRAPH)
        made_of = "the graph that it was compressed to"
    else:
        from llmo.compression.export import export  # torch takes seconds to import, and a copy needs none of it

        ctx.report(0, 3, stage="export")
        beside = source.weights
        export(beside, folder / GRAPH)
        made_of = _from_weights(source)
    if precision != "int8":
        return Written("fp32", made_of, beside)
    ctx.report(1, 3, stage="quantise")
    _quantise(folder / GRAPH)
    return Written("int8", f"{made_of}, brought to int8 here; no data set has measured what that costs", beside)


def _quantise(graph: Path) -> None:
    """As the variant onnx-int8 is made."""
    import onnx

    from llmo.compression.graphs import attention, heads, lean
    from llmo.compression.quantise import quantise

    model = onnx.load(graph)
    heads.cut(model)
    lean.lean(model)
    onnx.save(attention.spell(quantise(model, bits=PORTABLE_BITS)), graph)


def _openvino(source: Source, precision: str | None, folder: Path, ctx: Context) -> Written:
    stored = source.card["precision"] if source.card["engine"] == "openvino" else None
    if stored is not None and precision in (None, stored):
        for name in OPENVINO:
            shutil.copyfile(source.model / name, folder / name)
        return Written(stored, COPIED, source.model)
    if precision == "int8":
        raise SpecError(
            "int8 for OpenVINO is calibrated on texts of the data set, which an export does not read",
            hint="leave out --precision, or compress the model for OpenVINO first and export what came of it",
        )
    with needing("a model for OpenVINO", "openvino"):
        from llmo.compression import openvino_encoder
    from llmo.compression.export import export

    ctx.report(0, 3, stage="export")
    export(source.weights, folder / GRAPH)
    ctx.report(1, 3, stage="convert")
    openvino_encoder.write(folder / GRAPH, folder, "fp32")
    (folder / GRAPH).unlink()
    return Written("fp32", _from_weights(source), source.weights)


def _from_weights(source: Source) -> str:
    if source.weights == source.model:
        return "its weights at fp32"
    return f"the weights at fp32 of the model that was compressed to {source.made_for}, as it was before"
