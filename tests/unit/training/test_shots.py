"""Classifiers from few examples and from none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmo.errors import DataError, SpecError
from support.listening import Listening
from support.tiny import text_rows, tiny_dataset, write_split
from support.trained import replica, verified


def test_few_shot_learns_from_eight_of_each(train: Any, tmp_path: Path) -> None:
    rows = [row for topic in ("business", "sport", "tech")
            for row in [r for r in text_rows(200, 5, longest=12) if r["label"] == topic][:8]]  # fmt: skip
    data = tiny_dataset(tmp_path / "d", sizes={"train": 24, "dev": 0, "test": 96})
    write_split(data / "train.arrow", rows, "text-classification")
    result = train(data, method="few-shot", epochs=4, learning_rate=3e-3)
    before, after = (result["test"][when]["accuracy"]["value"] for when in ("before", "after"))
    assert result["steps"] == 4 * -(-24 * 10 // 16)
    assert after > before + 0.1


def test_zero_shot_learns_of_no_row(train: Any, tmp_path: Path, base: Path) -> None:
    """A random trunk still puts a text near a sentence of the same words."""
    data = tiny_dataset(tmp_path / "d", sizes={"train": 0, "dev": 0, "test": 60})
    rows = [row | {"text": f"{row['label']} {row['label']} {row['label']}"} for row in text_rows(60, longest=2)]
    write_split(data / "test.arrow", rows, "text-classification")
    result = train(data, method="zero-shot", template="{}")
    assert result["test"]["after"]["accuracy"]["value"] > 0.9
    assert (result["steps"], result["trained_parameters"], result["history"]) == (0, 0, [])
    folder = tmp_path / "out"
    assert all(check["passed"] for check in verified(folder, tmp_path / "v").values())
    assert "16 of 16" in replica(folder)
    old, new = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(new[f"bert.{name}"], value) for name, value in old.items() if "pooler" not in name)
    assert not new["classifier.weight"].any()


@pytest.mark.parametrize("method", ["few-shot", "zero-shot"])
def test_comparing_texts_is_of_whole_texts_with_one_label(
    train: Any, spans: Path, many: Path, base: Path, method: str
) -> None:
    with pytest.raises(SpecError, match=f"method {method} tells whole texts apart"):
        train(spans, "a", task="token-classification", method=method)
    with pytest.raises(SpecError, match="gives each text one label"):
        train(many, "b", method=method)


def test_one_example_of_a_label_is_too_few(train: Any, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "d", sizes={"train": 30, "dev": 8, "test": 8})
    rows = [*text_rows(30), {"id": "x", "text": "weather", "label": "weather"}]
    write_split(data / "train.arrow", rows, "text-classification")
    ctx = Listening(tmp_path / "c")
    with pytest.raises(DataError, match="the label 'weather' has 1 training row"):
        train(data, method="few-shot", ctx=ctx)
    assert not any("learning_rate" in report for report in ctx.reports)
