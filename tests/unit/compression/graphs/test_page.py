"""The page about these rewrites: its example runs as it stands, and what it makes answers like the model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx

from llmo.compression.graphs.calibration import logits

PAGE = Path(__file__).parents[4] / "docs" / "graphs.md"


def test_the_example_composes_every_rewrite(
    classifier: Path, model: onnx.ModelProto, texts: list[list[int]], tmp_path: Path
) -> None:
    example = re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert example
    names = {"folder": classifier, "target": tmp_path / "model.onnx", "train_ids": texts}
    exec(compile(example[1], str(PAGE), "exec"), names)
    made = names["graph"]
    assert isinstance(made, onnx.ModelProto)
    kinds = [node.op_type for node in made.graph.node]
    assert kinds.count("MatMulIntegerToFloat") == 2 * 6
    assert "MultiHeadAttention" not in kinds
    before, after = np.stack(logits(model, texts)), np.stack(logits(made, texts))
    assert 0 < np.abs(before - after).max() < 0.1 * np.abs(before).max()
