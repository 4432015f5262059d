"""The average of the weights, and the ranks that AdaLoRA shares out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llmo.engines.torch import open_model
from llmo.errors import SpecError
from llmo.files import sha256_file
from llmo.training.along import Average
from llmo.verify import adapter
from support.trained import run_twice, verified

QUICK: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-2, "precision": "fp32"}
CLOSE = 1e-4


@pytest.mark.parametrize("method", ["lora", "adalora", "prefix", "bottleneck", "full"])
def test_the_average_is_what_is_measured_and_saved(train: Any, texts: Path, tmp_path: Path, method: str) -> None:
    run_twice(
        lambda out, ctx: train(texts, out, ctx=ctx, method=method, ema=0.8, **QUICK), tmp_path, 7
    )  # fmt: skip
    train(texts, "bare", method=method, **QUICK)
    assert sha256_file(tmp_path / "bare" / "model.safetensors") != sha256_file(tmp_path / "whole" / "model.safetensors")
    assert all(check["passed"] for check in verified(tmp_path / "whole", tmp_path / "v").values())


def test_an_average_forgets_its_beginning() -> None:
    weight = nn.Parameter(torch.zeros(3))
    average = Average({"w": weight}, 0.99)
    for step in range(1, 1001):
        weight.data.fill_(float(step))
        average.update(step)
    expected, decay = 0.0, 0.99
    for step in range(1, 1001):
        share = min(decay, (1 + step) / (10 + step))
        expected = share * expected + (1 - share) * step
    assert average.values["w"].tolist() == pytest.approx([expected] * 3, rel=1e-3)
    with average.in_place():
        assert weight[0].item() == pytest.approx(expected, rel=1e-3)
    assert weight[0].item() == 1000.0


def test_the_adapter_has_the_ranks_of_the_average(train: Any, texts: Path, base: Path, tmp_path: Path) -> None:
    """An average keeps a little of the ranks that the last step does not have, and so must the adapter."""
    train(texts, method="adalora", ema=0.8, **{**QUICK, "learning_rate": 0.1})
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    gains = adapter.merged(tmp_path / "out", open_model(tmp_path / "out")).gains
    assert len(gains) == 12
    for name, gain in gains.items():
        assert torch.allclose(new[name], old[name.removeprefix("bert.")] + gain, atol=1e-6)
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert sum(sum(kept) for kept in settings["rank_pattern"].values()) > 12 * 8


def test_adalora_ends_at_its_rank(train: Any, texts: Path, tmp_path: Path) -> None:
    train(texts, method="adalora", epochs=6, learning_rate=1e-2, lora={"rank": 4})
    settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    ranks = [sum(kept) for kept in settings["rank_pattern"].values()]
    assert (settings["init_r"], len(ranks), sum(ranks)) == (6, 12, 12 * 4)
    assert len(set(ranks)) > 1


def test_a_run_too_short_for_adalora_is_refused(train: Any, texts: Path) -> None:
    with pytest.raises(SpecError, match="this one has 2 steps"):
        train(texts, method="adalora", epochs=0.34)
