"""A small classifier as training leaves one: no two vectors equal, an outlier channel where encoders have theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from llmo.compression.export import export
from support.headed import headed_model

OUTLIER = 5  # the channel


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with its fp32 graph."""
    folder = headed_model(tmp_path_factory.mktemp("graphs") / "model")
    weights = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(3)
    for name, array in weights.items():
        if array.ndim == 1:
            weights[name] = (array + rng.normal(0, 0.1, array.shape)).astype(np.float32)
        if name.endswith("attention.output.LayerNorm.weight"):
            weights[name][OUTLIER] = 20
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    export(folder, folder / "model.onnx")
    return folder


@pytest.fixture
def model(classifier: Path) -> onnx.ModelProto:
    """The fp32 graph, for a test to change."""
    return onnx.load(classifier / "model.onnx")


@pytest.fixture(scope="session")
def texts() -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [[2, *rng.integers(5, 90, length).tolist(), 3] for length in rng.integers(1, 40, 60)]
