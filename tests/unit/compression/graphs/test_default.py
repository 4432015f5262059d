"""The library's own default int8: made as it comes, and as wrong as it comes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx

from llmo.compression.export import export
from llmo.compression.graphs import default
from llmo.engines.base import Request
from llmo.engines.onnx import OnnxEngine
from llmo.types import Device


def test_it_is_what_the_library_makes_and_depends_on_the_batch(
    classifier: Path, texts: list[list[int]], tmp_path: Path
) -> None:
    assert export(classifier, tmp_path / "plain.onnx", fused=False) == "plain"
    default.quantise(tmp_path / "plain.onnx", tmp_path / "model.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert kinds.count("DynamicQuantizeLinear") > 0
    assert kinds.count("MatMulInteger") >= 2 * 6
    shutil.copy(classifier / "config.json", tmp_path)
    engine = OnnxEngine()
    engine.load(tmp_path, Device("cpu", "cpu", memory=0, free=0, cores=1))
    alone = next(iter(engine.run([Request(0, texts[0])]))).data
    together = next(
        chunk.data for chunk in engine.run([Request(i, ids) for i, ids in enumerate(texts)]) if not chunk.id
    )
    assert 1e-5 < np.abs(alone - together).max() < 0.5 * np.abs(alone).max()
