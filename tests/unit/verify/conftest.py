"""Really trained tiny models, whole and by LoRA, and one of them compressed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from llmo.compress.export import export
from llmo.compress.quantise import quantise
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
    tiny_dataset(folder / "data")
    return folder


def trained(workshop: Path, name: str, spec: TrainSpec) -> Path:
    out = workshop / name
    out.mkdir()
    task = TaskSpec(name="text-classification", max_length=16).plain()
    inputs = {"data": workshop / "data", "model": workshop / "base"}
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
def compressed(full: Path) -> Path:
    out = full.with_name("int8")
    out.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "golden.json"):
        shutil.copy(full / name, out)
    export(full, out / "model.onnx")
    onnx.save(quantise(onnx.load(out / "model.onnx")), out / "model.onnx")
    reference = {"digest": digest_of(manifest_of(full))}
    write_card(out, {**read_card(full), "engine": "onnx", "precision": "int8", "reference": reference})
    return out


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a model folder to harm."""

    def make(folder: Path) -> Path:
        return shutil.copytree(folder, tmp_path / f"{folder.name}-copy")

    return make


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    body = json.loads(path.read_text(encoding="utf-8"))
    change(body)
    path.write_text(json.dumps(body, ensure_ascii=False), encoding="utf-8")
