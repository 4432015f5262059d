"""kill -9 of a real training process at random steps: the weights are those of the unbroken run, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmo.files import sha256_file
from llmo.specs import TrainSpec
from llmo.tasks.card import read_card

pytestmark = pytest.mark.chaos

KILLS = 5
SPECS: dict[str, dict[str, Any]] = {
    "full": {"gradient_accumulation_steps": 2, "early_stopping": 9, "evaluate_every": 4},
    "lora": {"method": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": None}},
    "answers": {"method": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": None}},
    "preference": {"gradient_accumulation_steps": 2, "early_stopping": 9, "evaluate_every": 4},
    "sgd": {"optimizer": "sgd", "learning_rate": 0.05, "schedule": "cosine"},
}

WRITING = {"answers": ("chats", "talker"), "preference": ("pairs", "talker")}
STEPS = {"answers": 18, "preference": 24}


class Nursery:
    """The process that forks the jobs."""

    def __init__(self) -> None:
        script = str(Path(__file__).with_name("crash.py"))
        self._process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, asked: dict[str, Any], kill_at: int | None = None) -> tuple[list[int], int]:
        """The steps it reported and its wait status; `kill_at` is the step after which it is killed."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        pid = int(self._line().removeprefix("pid "))
        steps: list[int] = []
        while not (line := self._line()).startswith("end"):
            steps.append(int(line))
            if kill_at is not None and steps[-1] >= kill_at:
                os.kill(pid, signal.SIGKILL)
                kill_at = None
        return steps, int(line.removeprefix("end "))

    def close(self) -> None:
        self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the nursery ended"
        return line.strip()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.mark.parametrize("name", sorted(SPECS))
def test_killed_at_random_steps_it_ends_with_the_same_bytes(
    nursery: Nursery, request: pytest.FixtureRequest, tmp_path: Path, name: str
) -> None:
    data, model = (request.getfixturevalue(x) for x in WRITING.get(name, ("texts", "base")))
    task = "generation" if name in WRITING else "text-classification"
    spec = TrainSpec.model_validate(SPECS[name] | {"epochs": 6, "checkpoint_seconds": 1e-6}).plain()
    spec["task"] = {"name": task, "multi_label": None, "max_length": 96 if name in WRITING else 32}
    rng = random.Random(name)

    def asked(name: str) -> dict[str, Any]:
        folders = {"out": str(tmp_path / name), "checkpoint": str(tmp_path / f"{name}-checkpoint")}
        return {"data": str(data), "model": str(model), "spec": spec, **folders}

    steps, status = nursery.run(asked("whole"))
    assert (status, steps) == (0, list(range(1, STEPS.get(name, 36) + 1)))
    for at in sorted(rng.sample(range(1, STEPS.get(name, 36) - 2), KILLS)):
        steps, status = nursery.run(asked("killed"), kill_at=at)
        assert os.WTERMSIG(status) == signal.SIGKILL
        assert not (tmp_path / "killed" / "llmo.json").exists()
    steps, status = nursery.run(asked("killed"))
    assert status == 0
    assert steps[0] > 1  # it went on; it did not begin again
    for file in ("model.safetensors", "golden.json"):
        assert sha256_file(tmp_path / "whole" / file) == sha256_file(tmp_path / "killed" / file), file
    cards = [read_card(tmp_path / out) for out in ("whole", "killed")]
    assert cards[0]["history"] == cards[1]["history"]
    assert cards[0]["metrics"] == cards[1]["metrics"]
    assert list((tmp_path / "killed-checkpoint").iterdir()) == []
