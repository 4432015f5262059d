"""Checkpoints are whole or absent, and bring every random state back."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from llmo.errors import StorageError
from llmo.training import checkpoint

TENSORS = {"a": torch.arange(6.0).view(2, 3), "step": torch.tensor(3.0)}


def test_round_trip_and_only_the_newest_stays(tmp_path: Path) -> None:
    for step in (5, 10):
        checkpoint.save(tmp_path, step, TENSORS, {"fingerprint": "f", "x": step})
    assert [p.name for p in tmp_path.iterdir()] == ["step-10"]
    found = checkpoint.newest(tmp_path, "f")
    assert found is not None
    tensors, state = found
    assert (state["step"], state["x"]) == (10, 10)
    assert torch.equal(tensors["a"], TENSORS["a"])
    assert tensors["step"].shape == ()


def test_none_of_another_run(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path, "f") is None
    checkpoint.save(tmp_path, 1, TENSORS, {"fingerprint": "other"})
    assert checkpoint.newest(tmp_path, "f") is None


@pytest.mark.parametrize("harm", ["cut tensors", "no tensors", "cut state", "no state"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, harm: str) -> None:
    checkpoint.save(tmp_path, 1, TENSORS, {"fingerprint": "f"})
    good = tmp_path / "kept"
    (tmp_path / "step-1").rename(good)
    checkpoint.save(tmp_path, 2, TENSORS, {"fingerprint": "f"})
    good.rename(tmp_path / "step-1")
    path = tmp_path / "step-2" / (checkpoint.TENSORS if "tensors" in harm else checkpoint.STATE)
    if harm.startswith("cut"):
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.unlink()
    found = checkpoint.newest(tmp_path, "f")
    assert found is not None
    assert found[1]["step"] == 1


def test_one_left_half_written_is_not_seen_and_replaced(tmp_path: Path) -> None:
    half = tmp_path / ".step-4.tmp"
    half.mkdir()
    (half / checkpoint.TENSORS).write_bytes(b"half")
    assert checkpoint.newest(tmp_path, "f") is None
    checkpoint.save(tmp_path, 4, TENSORS, {"fingerprint": "f"})
    assert checkpoint.newest(tmp_path, "f") is not None
    checkpoint.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_the_old_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, TENSORS, {"fingerprint": "f"})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match="is full"):
        checkpoint.save(tmp_path, 2, TENSORS, {"fingerprint": "f"})
    found = checkpoint.newest(tmp_path, "f")
    assert found is not None
    assert found[1]["step"] == 1


def test_random_states_go_through_json() -> None:
    checkpoint.seed_everything(5)
    random.gauss(0, 1), np.random.standard_normal(), torch.randn(3)  # leaves half a pair in each
    state = json.loads(json.dumps(checkpoint.random_state()))

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), float(np.random.standard_normal()), *torch.randn(5).tolist()]

    first = draw()
    assert draw() != first
    checkpoint.restore_random_state(state)
    assert draw() == first


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_optimiser_goes_on_as_if_nothing_had_been(tmp_path: Path, kind: str) -> None:
    def make() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        cls = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind]
        return layer, cls(layer.parameters(), lr=0.1, fused=True, **({"momentum": 0.9} if kind == "sgd" else {}))

    def step(layer: nn.Linear, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        layer(torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    a, first = make()
    for seed in range(4):
        step(a, first, seed)
        if seed == 1:
            checkpoint.save(tmp_path, 2, checkpoint.pack(dict(a.named_parameters()), first), {"fingerprint": "f"})
    b, second = make()
    found = checkpoint.newest(tmp_path, "f")
    assert found is not None
    checkpoint.unpack(found[0], dict(b.named_parameters()), second)
    for seed in (2, 3):
        step(b, second, seed)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.bias, b.bias)
