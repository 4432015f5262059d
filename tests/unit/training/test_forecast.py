"""The forecast's arithmetic against models that are really there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmo.methods import METHODS
from llmo.specs import TaskSpec, TrainSpec
from llmo.training.forecast import forecast

MINILM = {
    "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12,
    "vocab_size": 30522, "max_position_embeddings": 512,
}  # fmt: skip
TASK = TaskSpec(name="text-classification")


def test_steps_and_the_folder_are_those_of_the_run(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    found = forecast(TrainSpec(epochs=2.5, batch_size=16), TASK, config, 100, 30.0)
    assert found.steps == round(7 * 2.5)
    weights = (base / "model.safetensors").stat().st_size
    assert found.disk_bytes > weights


@pytest.mark.parametrize(("method", "mebibytes"), [("full", 1329), ("lora", 1275), ("last-n", 935), ("head", 896)])
def test_the_measured_runs_are_met(method: str, mebibytes: int) -> None:
    """BBC news, 1450 rows cut to 128 tokens, batch 16, bf16, two cores: the peaks of the processes."""
    found = forecast(TrainSpec(epochs=2, method=method), TASK, MINILM, 1450, 480.0)
    assert found.steps == 182
    assert found.memory_bytes == pytest.approx(mebibytes << 20, rel=0.2)


SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
}  # fmt: skip


def test_the_measured_run_of_a_causal_model_is_met() -> None:
    """SmolLM2 on 449 short conversations, LoRA, batch 8, bf16, two cores: steps, and the peak of the process."""
    task, train = TaskSpec(name="generation"), TrainSpec(method="lora", epochs=1, batch_size=8)
    found = forecast(train, task, SMOLLM2, 449, 57.6)
    assert found.steps == 57
    assert found.memory_bytes == pytest.approx(3486 << 20, rel=0.2)
    pairs = forecast(train.model_copy(update={"objective": "preference"}), task, SMOLLM2, 449, 57.6)
    assert pairs.memory_bytes > found.memory_bytes


def test_less_trained_needs_less() -> None:
    def memory(**keys: object) -> int:
        return forecast(TrainSpec(**keys), TASK, MINILM, 1450, 480.0).memory_bytes

    assert memory(method="head") < memory(method="last-n") < memory(method="lora") < memory()
    assert memory(gradient_accumulation_steps=4) < memory() < memory(batch_size=64)
    assert memory(early_stopping=2) > memory()


def test_every_method_has_a_forecast() -> None:
    found = {name: forecast(TrainSpec(method=name), TASK, MINILM, 40, 30.0) for name in METHODS}
    assert (found["zero-shot"].steps, found["few-shot"].steps, found["lora"].steps) == (0, 75, 9)
    assert found["zero-shot"].memory_bytes < found["ia3"].memory_bytes < found["lora"].memory_bytes
    assert found["lora"].memory_bytes < found["adalora"].memory_bytes < found["full"].memory_bytes
    narrow = forecast(TrainSpec(method="lora", base_weights="int4"), TASK, MINILM, 40, 30.0)
    assert narrow.memory_bytes < found["lora"].memory_bytes


def test_unknown_configs_still_get_a_number() -> None:
    found = forecast(TrainSpec(), TASK, {"model_type": "novel", "d_model": 512}, 10, 5.0)
    assert found.memory_bytes > 0


def test_no_torch() -> None:
    code = "import sys, llmo.training.forecast; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
