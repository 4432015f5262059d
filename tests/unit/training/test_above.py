"""Training above frozen layers from what they said once is training the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmo.context import NullContext
from llmo.jobspecs import TrainJobSpec
from llmo.training import states
from llmo.training.operation import run
from llmo.training.trunk import Trunk
from support.tiny import tiny_model


class Sharing(NullContext):
    """Jobs of one store: each with checkpoints of its own, one cache."""

    def __init__(self, folder: Path, shared: Path) -> None:
        super().__init__(1, folder)
        self._shared = shared
        self.notes: list[str] = []

    def cache(self) -> Path:
        self._shared.mkdir(exist_ok=True)
        return self._shared

    def note(self, message: str) -> None:
        self.notes.append(message)


def trained(
    base: Path, texts: Path, place: Path, shared: Path, task: str = "text-classification", **keys: Any
) -> tuple[dict[str, Any], list[str]]:
    out = place / "out"
    out.mkdir(parents=True)
    ctx = Sharing(place / "checkpoint", shared)
    task = {"name": task, "max_length": 32}
    spec = TrainJobSpec(task=task, epochs=3, learning_rate=1e-2, dropout=0.0, precision="fp32", **keys)
    return run(spec.plain(), {"data": texts, "model": base}, out, ctx), ctx.notes


@pytest.mark.parametrize("keys", [{"method": "head"}, {"method": "last-n", "last_n": 1}])
def test_the_losses_are_those_of_the_whole_model(tmp_path: Path, texts: Path, keys: dict[str, Any]) -> None:
    base = tiny_model(tmp_path / "base", layers=3)
    kept, notes = trained(base, texts, tmp_path / "kept", tmp_path / "cache", **keys)
    whole, others = trained(base, texts, tmp_path / "whole", tmp_path / "cache", keep_states=False, **keys)
    assert any("what they say of each text is kept" in note for note in notes)
    assert not any("what they say of each text" in note for note in others)
    for one, other in zip(kept["history"], whole["history"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert kept["test"]["after"]["accuracy"]["value"] == pytest.approx(
        whole["test"]["after"]["accuracy"]["value"], abs=0.1
    )


def test_labels_of_tokens_are_learnt_where_the_tokens_are(tmp_path: Path, spans: Path) -> None:
    base = tiny_model(tmp_path / "base", layers=3)
    about = {"method": "head", "task": "token-classification"}
    kept, notes = trained(base, spans, tmp_path / "kept", tmp_path / "cache", **about)
    whole, _ = trained(base, spans, tmp_path / "whole", tmp_path / "cache", keep_states=False, **about)
    assert any("what they say of each text is kept" in note for note in notes)
    losses = [[one["loss"] for one in found["history"]] for found in (kept, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_second_training_computes_nothing_below(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(tmp_path / "base", layers=3)
    trained(base, texts, tmp_path / "first", tmp_path / "cache", method="head")
    run_below: list[int] = []
    below = Trunk.below

    def counted(self: Trunk, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        run_below.append(len(inputs["input_ids"]))
        return below(self, inputs)

    monkeypatch.setattr(Trunk, "below", counted)
    _, notes = trained(base, texts, tmp_path / "second", tmp_path / "cache", method="head", seed=5)
    assert any("is there from before" in note for note in notes)
    assert sum(run_below) == 2  # the two texts that prove the division


def test_what_would_not_fit_is_not_kept(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "room", lambda _: 10)
    base = tiny_model(tmp_path / "base", layers=3)
    result, notes = trained(base, texts, tmp_path / "one", tmp_path / "cache", method="head")
    assert any("they run at every step" in note for note in notes)
    assert np.isfinite(result["history"][0]["loss"])
    assert not list((tmp_path / "cache").iterdir())
