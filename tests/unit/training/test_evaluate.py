"""The operation `evaluate` measures what `train` measured, through the engine that serves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmo.context import NullContext
from llmo.errors import DataError, ModelError, SpecError
from llmo.training import evaluate
from support.tiny import tiny_dataset

Train = Callable[..., dict[str, Any]]


def measured(data: Path, model: Path, out: Path, split: str = "test") -> dict[str, Any]:
    out.mkdir()
    return evaluate.run({"split": split}, {"data": data, "model": model}, out, NullContext(1))


def test_it_agrees_with_training(train: Train, texts: Path, tmp_path: Path) -> None:
    trained = train(texts, epochs=8, learning_rate=1e-2)
    for split, expected in (("test", trained["test"]["after"]), ("dev", trained["dev"])):
        result = measured(texts, tmp_path / "out", tmp_path / split, split)
        assert result["metrics"] == expected
    assert (result["engine"], result["precision"], result["rows"], result["metric"]) == (
        "torch",
        "fp32",
        32,
        "accuracy",
    )


def test_the_report_holds_the_confusion_matrix(train: Train, texts: Path, tmp_path: Path) -> None:
    train(texts, epochs=2)
    result = measured(texts, tmp_path / "out", tmp_path / "report")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    confusion = report["details"]["confusion"]
    assert sum(map(sum, confusion)) == 32
    right = sum(confusion[i][i] for i in range(3))
    assert right / 32 == pytest.approx(result["metrics"]["accuracy"]["value"])
    assert report["metrics"] == result["metrics"]


def test_spans_are_counted_per_type(train: Train, spans: Path, tmp_path: Path) -> None:
    train(spans, task="token-classification", epochs=2)
    measured(spans, tmp_path / "out", tmp_path / "report")
    details = json.loads((tmp_path / "report" / "report.json").read_text())["details"]["per_type"]
    assert set(details) == {"person", "place"}
    assert all(counts["gold"] > 0 for counts in details.values())


def test_an_empty_split_is_refused(train: Train, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "d", sizes={"train": 32, "dev": 8, "test": 0})
    train(data, epochs=0.1)
    with pytest.raises(DataError, match="'test' has no rows"):
        measured(data, tmp_path / "out", tmp_path / "report")


def test_an_unknown_split_and_an_untrained_model_are_refused(texts: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="'split'"):
        measured(texts, base, tmp_path / "a", "validation")
    with pytest.raises(ModelError, match=r"no llmo\.json"):
        measured(texts, base, tmp_path / "b")
