"""Plans that need less memory: which one is named, and a real training that runs out and goes on in smaller parts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from llmo.context import NullContext
from llmo.doors.cli import summary
from llmo.errors import NeedsError, SpecError
from llmo.files import sha256_file
from llmo.jobspecs import TrainJobSpec
from llmo.specs import TaskSpec, TrainSpec
from llmo.training import relief
from llmo.training.correction import LEAST_ERROR, correct
from llmo.training.fitting import fit, refuse
from llmo.training.forecast import Rows, forecast
from support.tiny import text_rows, tiny_dataset, write_split

Train = Callable[..., dict[str, Any]]
LARGE = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "vocab_size": 30522, "max_position_embeddings": 512,
}  # fmt: skip
TASK = TaskSpec(name="text-classification", max_length=512)
ROWS = Rows(1000, 300.0, 512)
PARTS = {"gradient_accumulation_steps": 4}
ONE: dict[str, Any] = {"batch_size": 1, "method": "lora"}
WHOLE = 1 << 20  # tokens: batches are divided by steps alone
PLAIN = correct([], "full", 0)


def needs(**keys: Any) -> int:
    plan = TrainSpec(part_tokens=WHOLE, **keys)
    return forecast(plan, TASK, LARGE, ROWS, bf16=plan.precision != "fp32").memory_bytes


def instead(memory: int, **keys: Any) -> dict[str, Any]:
    """What is told of a plan on a machine of so many bytes."""
    return fit(TrainSpec(part_tokens=WHOLE, **keys), TASK, LARGE, ROWS, PLAIN, bf16=True, memory=memory)


def test_a_plan_that_fits_is_left_alone() -> None:
    found = instead(256 << 30, batch_size=64)
    assert found["fits"] is True
    assert "instead" not in found
    refuse(found, 256 << 30)


@pytest.mark.parametrize(
    ("keys", "other", "changes"),
    [
        ({"batch_size": 64}, {"batch_size": 64, **PARTS}, PARTS),
        ({**ONE, "precision": "fp32"}, ONE, {"precision": "bf16"}),
        (ONE, {**ONE, "activation_checkpointing": True}, {"activation_checkpointing": True}),
    ],
)
def test_the_nearest_plan_that_fits_is_a_line_to_paste(
    keys: dict[str, Any], other: dict[str, Any], changes: dict[str, Any]
) -> None:
    """On a machine with just the room for `other` at the top of the error bar."""
    memory = round(needs(**other) * (1 + PLAIN.error)) + 1
    found = instead(memory, **keys)
    assert yaml.safe_load(found["instead"])["train"] == changes
    TrainSpec(**{**keys, **yaml.safe_load(found["instead"])["train"]})
    assert instead(memory, **{**keys, **changes})["fits"] is True


def test_a_full_training_may_have_to_become_an_adapter() -> None:
    memory = round(needs(batch_size=1, method="lora", activation_checkpointing=True) * (1 + PLAIN.error)) + 1
    assert yaml.safe_load(instead(memory, batch_size=4)["instead"])["train"]["method"] == "lora"


def test_what_may_not_fit_is_said_and_not_refused() -> None:
    just = needs(batch_size=32)
    found = instead(just, batch_size=32)
    assert found["low_bytes"] < just == found["memory_bytes"] < found["high_bytes"]
    assert found["fits"] is None
    assert found["instead"].startswith("train: {gradient_accumulation_steps: ")
    refuse(found, just)
    assert summary._may_not_fit(found) == [
        "the training may not fit into the memory that LLMO may use here; the nearest that does: " + found["instead"]
    ]


def test_what_surely_does_not_fit_is_refused_with_it() -> None:
    found = instead(9 << 30, batch_size=256)
    with pytest.raises(NeedsError, match=r"needs about .* GiB .* 9\.0 GiB here") as refused:
        refuse(found, 9 << 30)
    assert "train: {gradient_accumulation_steps: " in refused.value.hint
    with pytest.raises(NeedsError) as hopeless:
        refuse(instead(1 << 20), 1 << 20)
    assert "smaller model" in hopeless.value.hint


def test_a_training_is_refused_before_it_computes(train: Train, texts: Path, tmp_path: Path) -> None:
    ctx = NullContext(1, tmp_path / "c")
    object.__setattr__(ctx.device, "free", 100 << 20)
    reports: list[Any] = []
    ctx._on_report = lambda step, total, said: reports.append(said)
    with pytest.raises(NeedsError, match="needs about"):
        train(texts, ctx=ctx)
    assert all(said.get("phase") == "tokenise" for said in reports)


class Again(NullContext):
    def __init__(self, folder: Path, after: str) -> None:
        super().__init__(1, folder)
        self.after = after
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)


def plan(**keys: Any) -> TrainJobSpec:
    return TrainJobSpec(task=TaskSpec(name="text-classification"), **keys)


def test_an_attempt_after_the_kernel_killed_one_for_memory_is_smaller(tmp_path: Path) -> None:
    first = Again(tmp_path, "out_of_memory")
    assert relief.resume(plan(), first).gradient_accumulation_steps == 4
    assert "`train: {gradient_accumulation_steps: 4, part_tokens: 512}`" in first.notes[0]
    # Killed by something else after that: it stays small, and says nothing.
    second = Again(tmp_path, "lost")
    assert relief.resume(plan(), second).gradient_accumulation_steps == 4
    assert second.notes == []
    with pytest.raises(MemoryError, match="in smaller parts too"):
        relief.resume(plan(), Again(tmp_path, "out_of_memory"))
    relief.forget(second)
    assert relief.resume(plan(), second) == plan()


@pytest.mark.parametrize("after", ["", "lost", "preempted"])
def test_what_ended_for_other_reasons_goes_on_as_it_was(tmp_path: Path, after: str) -> None:
    assert relief.resume(plan(), Again(tmp_path, after)) == plan()


def test_one_row_at_a_time_cannot_be_smaller(tmp_path: Path) -> None:
    with pytest.raises(MemoryError, match=r"activation_checkpointing: true or train\.method: lora"):
        relief.shrink(plan(batch_size=4, gradient_accumulation_steps=4), Again(tmp_path, ""))


WIDE: dict[str, Any] = {
    "batch_size": 256,
    "part_tokens": WHOLE,
    "epochs": 2.0,
    "dropout": 0.0,
    "precision": "fp32",
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long texts: a batch of 256 needs some 300 MiB with the tiny model, a quarter of it 80."""
    folder = tiny_dataset(tmp_path_factory.mktemp("data") / "wide", sizes={"train": 8, "dev": 0, "test": 4})
    rows = [{**row, "text": " ".join([row["text"]] * 20)} for row in text_rows(256, 5)]
    write_split(folder / "train.arrow", rows, "text-classification")
    return folder


def squeezed(base: Path, data: Path, folder: Path, *more_mib: int) -> list[str]:
    spec = TrainSpec(**WIDE).plain() | {"task": {"name": "text-classification", "multi_label": None, "max_length": 128}}
    asked = {"model": str(base), "data": str(data), "folder": str(folder), "spec": spec, "more_mib": more_mib}
    command = [sys.executable, str(Path(__file__).with_name("squeeze.py")), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_a_step_without_memory_is_tried_again_in_smaller_parts(
    train: Train, base: Path, wide: Path, tmp_path: Path
) -> None:
    said = squeezed(base, wide, tmp_path, 20, 220)
    ran_out = [number for number, line in enumerate(said) if line.startswith("NOTE ran out of memory with 256 rows")]
    ends = [number for number, line in enumerate(said) if line.startswith(("NONE", "PARTS"))]
    # Once, and where that is not enough no more.
    assert said[ends[0]].startswith("NONE it ran out in smaller parts too")
    assert said[ends[1]] == "PARTS 4"
    assert ran_out[0] < ends[0] < ran_out[1] < ends[1]
    assert len(ran_out) == 2
    train(wide, "parts", max_length=128, **WIDE, gradient_accumulation_steps=4)
    train(wide, "whole", max_length=128, **WIDE)
    # As if it had been asked for so, and as the whole batch but for rounding.
    found = tmp_path / "squeezed-220" / "model.safetensors"
    assert sha256_file(found) == sha256_file(tmp_path / "parts" / "model.safetensors")
    ours, theirs = load_file(found), load_file(tmp_path / "whole" / "model.safetensors")
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-4


def test_history_corrects_and_narrows() -> None:
    assert (PLAIN.factor, PLAIN.runs) == (1.0, 0)

    def runs(count: int, ratio: float, **keys: Any) -> list[dict[str, Any]]:
        one = {"forecast_bytes": 1 << 30, "peak_bytes": round(ratio * (1 << 30)), "method": "full", "parameters": 100}
        return [{**one, **keys}] * count

    few, many = (correct(runs(count, 1.2), "full", 100) for count in (2, 30))
    assert 1.0 < few.factor < many.factor < 1.2
    assert many.factor == pytest.approx(1.2, abs=0.03)
    assert LEAST_ERROR <= many.error < few.error
    assert correct(runs(30, 1.2), "full", 102).factor == many.factor  # a head more is the same model
    other = correct(runs(2, 1.2), "lora", 100)
    assert 1.0 < other.factor < few.factor
    mixed = correct(runs(15, 0.8) + runs(15, 1.25), "full", 100)
    assert mixed.factor == pytest.approx(1.0, abs=0.03)
    assert mixed.error > few.error


@pytest.mark.parametrize("method", ["full", "lora"])
def test_recomputed_activations_give_the_same_weights(train: Train, texts: Path, tmp_path: Path, method: str) -> None:
    for out, recomputes in (("kept", False), ("again", True)):
        train(texts, out, method=method, epochs=1, precision="fp32", activation_checkpointing=recomputes)
    kept, again = (load_file(tmp_path / out / "model.safetensors") for out in ("kept", "again"))
    # LoRA's layers are joined only where nothing is run again, which adds in another order.
    assert all(np.allclose(kept[name], again[name], rtol=0, atol=0 if method == "full" else 1e-5) for name in kept)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_and_of_a_causal_model_too(train: Train, chats: Path, talker: Path, tmp_path: Path, method: str) -> None:
    for out, recomputes in (("kept", False), ("again", True)):
        keys: dict[str, Any] = {"task": "generation", "model": talker, "max_length": 128, "precision": "fp32"}
        train(chats, out, method=method, epochs=1, activation_checkpointing=recomputes, **keys)
    kept, again = (load_file(tmp_path / out / "model.safetensors") for out in ("kept", "again"))
    # The tokens that all rows begin with are run once a batch, or once a row: the same but for rounding.
    assert max(np.abs(kept[name] - again[name]).max() for name in kept) < 1e-4


def test_an_architecture_without_it_is_refused(train: Train, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertPreTrainedModel

    monkeypatch.setattr(BertPreTrainedModel, "supports_gradient_checkpointing", False)
    with pytest.raises(SpecError, match="no activation checkpointing for the architecture 'bert'"):
        train(texts, activation_checkpointing=True)
