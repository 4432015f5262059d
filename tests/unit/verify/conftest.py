"""Really trained tiny models, whole and by LoRA, and one of them compressed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from llmo.compression.export import export
from llmo.compression.quantise import quantise
from llmo.context import NullContext
from llmo.files import digest_of, manifest_of
from llmo.specs import LoraSpec, TaskSpec, TrainSpec
from llmo.tasks.card import read_card, write_card
from llmo.training.operation import run as train
from support.tiny import tiny_dataset, tiny_model


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    tiny_model(folder / "base")
    return folder


def trained(workshop: Path, name: str, spec: TrainSpec, task_name: str = "text-classification") -> Path:
    out = workshop / name
    out.mkdir()
    task = TaskSpec(name=task_name, max_length=16).plain()
    data = tiny_dataset(workshop / f"{name}-data", task_name)
    inputs = {"data": data, "model": workshop / "base"}
    train({**spec.plain(), "task": task}, inputs, out, NullContext(1, workshop / f"{name}-checkpoint"))
    return out


@pytest.fixture(scope="module")
def full(workshop: Path) -> Path:
    return trained(workshop, "full", TrainSpec(epochs=2, learning_rate=3e-3, precision="fp32"))


@pytest.fixture(scope="module")
def lora(workshop: Path) -> Path:
    spec = TrainSpec(
        method="lora", epochs=2, learning_rate=3e-3, precision="fp32", lora=LoraSpec(rank=4, alpha=8, dropout=0.0)
    )
    return trained(workshop, "lora", spec)


@pytest.fixture(scope="module")
def tagger(workshop: Path) -> Path:
    spec = TrainSpec(epochs=2, learning_rate=3e-3, precision="fp32")
    return trained(workshop, "tagger", spec, "token-classification")


@pytest.fixture(scope="module")
def compressed(full: Path) -> Path:
    return as_int8(full)


@pytest.fixture(scope="module")
def compressed_tagger(tagger: Path) -> Path:
    return as_int8(tagger)


def as_int8(model: Path) -> Path:
    out = model.with_name(model.name + "-int8")
    out.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "golden.json"):
        shutil.copy(model / name, out)
    export(model, out / "model.onnx")
    onnx.save(quantise(onnx.load(out / "model.onnx")), out / "model.onnx")
    reference = {"digest": digest_of(manifest_of(model))}
    write_card(out, {**read_card(model), "engine": "onnx", "precision": "int8", "reference": reference})
    return out


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a model folder to harm."""

    def make(folder: Path) -> Path:
        return shutil.copytree(folder, tmp_path / f"{folder.name}-copy")

    return make
