"""The leaner graph: the same answers, fewer lookups, and no slow fused kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from llmo.compression.export import export
from llmo.compression.graphs.calibration import logits
from llmo.compression.graphs.lean import lean
from llmo.engines.onnx import session_options
from support.headed import headed_model


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def optimised(model: onnx.ModelProto, folder: Path) -> list[str]:
    """What ONNX Runtime makes of it."""
    options = session_options(1)
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return kinds(onnx.load(options.optimized_model_filepath))


def test_the_answers_stay_and_the_lookups_go(model: onnx.ModelProto, texts: list[list[int]], tmp_path: Path) -> None:
    before, count = logits(model, texts), len(model.graph.node)
    assert "BiasGelu" in optimised(model, tmp_path)
    lean(model)
    assert np.abs(np.stack(before) - np.stack(logits(model, texts))).max() < 1e-5
    assert count - len(model.graph.node) == 7
    assert kinds(model).count("Gather") == 2  # words, and the first token for the head
    assert "BiasGelu" not in optimised(model, tmp_path)


@pytest.mark.parametrize("architecture", ["distilbert", "roberta"])
def test_models_that_look_up_positions_otherwise_keep_their_answers(
    architecture: str, texts: list[list[int]], tmp_path: Path
) -> None:
    folder = headed_model(tmp_path / "model", architecture=architecture)
    export(folder, folder / "model.onnx")
    model = onnx.load(folder / "model.onnx")
    before = logits(model, texts)
    assert np.abs(np.stack(before) - np.stack(logits(lean(model), texts))).max() < 1e-5


def test_token_types_that_differ_are_not_joined(model: onnx.ModelProto) -> None:
    types = next(
        t
        for t in model.graph.initializer
        if onnx.numpy_helper.to_array(t).dtype == np.int64
        and len(t.dims) == 2
        and not onnx.numpy_helper.to_array(t).any()
    )
    types.CopyFrom(onnx.numpy_helper.from_array(np.ones(tuple(types.dims), np.int64), types.name))
    gathers = kinds(model).count("Gather")
    assert kinds(lean(model)).count("Gather") == gathers
