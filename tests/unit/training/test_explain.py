"""What training chooses, told and measured before it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmo.context import NullContext
from llmo.errors import DataError
from llmo.jobspecs import TrainJobSpec
from llmo.training.explain import run


def explained(
    base: Path, texts: Path, out: Path, task: str = "text-classification", length: int = 32, **keys: Any
) -> dict[str, Any]:
    out.mkdir()
    spec = TrainJobSpec(task={"name": task, "max_length": length}, **keys)
    found = run(spec.plain(), {"data": texts, "model": base}, out, NullContext())
    assert (out / "report.json").is_file()
    return found


def test_every_choice_has_a_reason_and_what_is_measured_a_gain(base: Path, texts: Path, tmp_path: Path) -> None:
    found = explained(base, texts, tmp_path / "out", part_tokens=32)
    choices = {one["what"]: one for one in found["choices"]}
    assert {"threads", "batches", "precision", "parts", "attention", "activation checkpointing"} <= set(choices)
    assert all(one["choice"] and one["why"] for one in choices.values())
    assert choices["batches"]["gain"] >= 1.0
    assert choices["parts"]["measured"]
    assert choices["parts"]["gain"] > 0
    assert found["steps"] > 0
    assert found["seconds"] > 0


def test_frozen_layers_are_told(base: Path, texts: Path, tmp_path: Path) -> None:
    found = explained(base, texts, tmp_path / "out", method="head")
    choices = {one["what"]: one["choice"] for one in found["choices"]}
    assert choices["frozen layers"] == "2 of 2 run once"
    assert "embedding" not in choices


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_that_writes_is_explained(talker: Path, chats: Path, tmp_path: Path, method: str) -> None:
    found = explained(talker, chats, tmp_path / "out", "generation", 64, method=method, batch_size=4)
    choices = {one["what"]: one for one in found["choices"]}
    assert choices["rows"]["choice"] == "end to end"
    assert choices["rows"]["gain"] > 0
    assert "attention" not in choices


def test_a_method_without_steps_is_refused(base: Path, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="takes no steps"):
        explained(base, texts, tmp_path / "out", method="zero-shot")
