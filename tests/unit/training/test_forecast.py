"""The forecast's arithmetic against models that are really there."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from llmo.methods import METHODS
from llmo.specs import LoraSpec, TaskSpec, TrainSpec
from llmo.training.forecast import Rows, forecast, micro_batch

MINILM = {
    "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
    "vocab_size": 30522, "max_position_embeddings": 512,
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
}  # fmt: skip
TASK = TaskSpec(name="text-classification")
ROOT = Path(__file__).parents[3]


def test_steps_and_the_folder_are_those_of_the_run(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    found = forecast(TrainSpec(epochs=2.5, batch_size=16), TASK, config, Rows(100, 30.0, 60))
    assert found.steps == round(7 * 2.5)
    weights = (base / "model.safetensors").stat().st_size
    assert found.disk_bytes > weights


def test_every_measured_run_is_met() -> None:
    """The peaks of processes on two cores that benchmarks/forecast.py wrote down, and the table made of them."""
    made = runpy.run_path(str(ROOT / "benchmarks" / "forecast.py"))
    measured = made["known"]()
    assert len(measured) >= 20
    for found in measured.values():
        ratio = made["predicted"](found) / found["peak"]
        assert 0.9 <= ratio <= 1.25, (found["config"], ratio)
    page = (ROOT / "docs" / "forecast.md").read_text(encoding="utf-8")
    assert made["table"]()[0] in page, "run: python benchmarks/forecast.py --table"


@pytest.mark.parametrize(("method", "mebibytes"), [("full", 1329), ("lora", 1275), ("last-n", 935), ("head", 896)])
def test_whole_trainings_are_met(method: str, mebibytes: int) -> None:
    """BBC news, 1450 rows cut to 128 tokens, batch 16, bf16, two cores: 182 steps, not three as in the table."""
    found = forecast(TrainSpec(epochs=2, method=method), TASK, MINILM, Rows(1450, 480.0, 3000))
    assert found.steps == 182
    assert 0.9 <= found.memory_bytes / (mebibytes << 20) <= 1.25


def test_a_whole_training_of_a_causal_model_is_met() -> None:
    """672 short conversations, LoRA, batch 8, bf16, two cores."""
    task, train = TaskSpec(name="generation", max_length=128), TrainSpec(method="lora", epochs=1, batch_size=8)
    found = forecast(train, task, SMOLLM2, Rows(672, 57.6, 128))
    assert found.steps == 84
    assert 0.9 <= found.memory_bytes / (3290 << 20) <= 1.25


LONG = Rows(1450, 480.0, 3000)


def test_less_trained_needs_less() -> None:
    def memory(**keys: object) -> int:
        return forecast(TrainSpec(**keys), TASK, MINILM, LONG).memory_bytes

    assert memory(method="head") < memory(method="last-n") < memory(method="lora") < memory()
    assert memory(gradient_accumulation_steps=4) < memory() < memory(batch_size=64)
    assert memory(activation_checkpointing=True) < memory()
    assert memory(early_stopping=2) > memory()
    assert memory() < forecast(TrainSpec(), TASK, MINILM, LONG, bf16=False).memory_bytes


def test_the_longest_rows_make_the_peak_and_no_longer_than_is_read() -> None:
    short, long, longer = (
        forecast(TrainSpec(), TASK, MINILM, Rows(1000, 20.0, longest)).memory_bytes for longest in (40, 128, 5000)
    )
    assert short < long == longer


def test_a_batch_is_no_larger_than_the_rows() -> None:
    few, many = (
        forecast(TrainSpec(batch_size=size), TASK, MINILM, Rows(32, 100.0, 128)).memory_bytes for size in (32, 5000)
    )
    assert few == many


def test_pairs_need_more_than_answers() -> None:
    task = TaskSpec(name="generation")
    answers, pairs = (
        forecast(TrainSpec(method="lora", objective=objective), task, SMOLLM2, Rows(449, 57.6, 400)).memory_bytes
        for objective in ("answers", "preference")
    )
    assert pairs > answers


def test_texts_that_are_compared_are_computed_together() -> None:
    rows, wide = Rows(1000, 100.0, 128), {"precision": "fp32", "part_tokens": 1 << 20}
    twice = forecast(TrainSpec(batch_size=32, **wide), TASK, MINILM, rows, bf16=False).memory_bytes
    shots = forecast(TrainSpec(method="few-shot", batch_size=16, **wide), TASK, MINILM, rows, bf16=False).memory_bytes
    pairs = TaskSpec(name="sentence-embedding")
    embedded = forecast(TrainSpec(batch_size=16, **wide), pairs, MINILM, rows, bf16=False).memory_bytes
    assert shots == embedded == twice


def test_adapters_with_dropout_are_not_joined() -> None:
    def memory(**keys: object) -> int:
        train = TrainSpec(method="lora", lora=LoraSpec(**keys), epochs=1, batch_size=8)
        return forecast(train, TaskSpec(name="generation", max_length=128), SMOLLM2, Rows(672, 57.6, 128)).memory_bytes

    assert memory(dropout=0.1) != memory()


@pytest.mark.parametrize(("batch", "parts", "rows"), [(16, 1, 16), (16, 4, 4), (10, 4, 3), (4, 4, 1)])
def test_a_micro_batch_is_the_largest_part(batch: int, parts: int, rows: int) -> None:
    assert micro_batch(TrainSpec(batch_size=batch, gradient_accumulation_steps=parts)) == rows


def test_every_method_has_a_forecast() -> None:
    found = {name: forecast(TrainSpec(method=name), TASK, MINILM, Rows(40, 30.0, 60)) for name in METHODS}
    assert (found["zero-shot"].steps, found["few-shot"].steps, found["lora"].steps) == (0, 75, 9)
    assert found["zero-shot"].memory_bytes < found["ia3"].memory_bytes < found["lora"].memory_bytes
    assert found["lora"].memory_bytes < found["adalora"].memory_bytes < found["full"].memory_bytes
    narrow = forecast(TrainSpec(method="lora", base_weights="int4"), TASK, MINILM, Rows(40, 30.0, 60))
    assert narrow.memory_bytes < found["lora"].memory_bytes


def test_unknown_configs_still_get_a_number() -> None:
    found = forecast(TrainSpec(), TASK, {"model_type": "novel", "d_model": 512}, Rows(10, 5.0, 9))
    assert found.memory_bytes > 0


def test_no_torch() -> None:
    code = "import sys, llmo.training.forecast; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
