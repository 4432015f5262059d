"""A tiny base model and tiny data sets, made once for all tests of training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmo.context import NullContext
from llmo.specs import TrainSpec
from llmo.training import operation
from support.places import ON_GPU, place
from support.tiny import tiny_chat_dataset, tiny_dataset, tiny_model
from support.tiny_chat import tiny_chat_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data") / "many", multi_label=True)


@pytest.fixture(scope="session")
def spans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data") / "spans", "token-classification")


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("base") / "talker")


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_dataset(tmp_path_factory.mktemp("data") / "chats")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"train": 64, "dev": 16, "test": 48}
    return tiny_chat_dataset(tmp_path_factory.mktemp("data") / "pairs", "preference", sizes=sizes)


@pytest.fixture
def train(base: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run the operation on one core; keywords are keys of the train section, `task`, `max_length` and `ctx`."""

    def run(data: Path, out: str = "out", **keys: Any) -> dict[str, Any]:
        task = keys.pop("task", "text-classification")
        length = keys.pop("max_length", 48)
        model = keys.pop("model", base)
        ctx = keys.pop("ctx", None) or NullContext(1, tmp_path / f"{out}-checkpoint")
        if ON_GPU:
            ctx.device = place()
        (tmp_path / out).mkdir()
        spec = TrainSpec(**keys).plain() | {"task": {"name": task, "multi_label": None, "max_length": length}}
        return operation.run(spec, {"data": data, "model": model}, tmp_path / out, ctx)

    return run
