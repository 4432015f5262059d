"""Tiny trained models of several tasks, and the data that they learnt of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from llmo.context import NullContext
from llmo.specs import TaskSpec, TrainSpec
from llmo.training.operation import run as train
from support.tiny import tiny_dataset, tiny_model

Made = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`taught(task, multi_label)`: the folders of a trained model of three layers and of its data."""
    home = tmp_path_factory.mktemp("taught")
    base = tiny_model(home / "base", layers=3)

    @cache
    def make(task: str, multi_label: bool) -> tuple[Path, Path]:
        name = f"{task}-{multi_label}"
        model, data = home / name, home / f"{name}-data"
        tiny_dataset(data, task, multi_label=multi_label, sizes={"train": 64, "dev": 32, "test": 8})
        model.mkdir()
        spec = TrainSpec(epochs=10 if multi_label else 4, learning_rate=3e-3, precision="fp32").plain()
        about = {"task": TaskSpec(name=task, max_length=32).plain()}
        train(spec | about, {"data": data, "model": base}, model, NullContext(1, home / f"{name}-checkpoint"))
        return model, data

    return lambda task="text-classification", multi_label=False: make(task, multi_label)
