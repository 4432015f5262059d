"""Which weights are trained, and what a base must be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import BertForSequenceClassification

from llmo.errors import ModelError, SpecError
from llmo.specs import LoraSpec, TrainSpec
from llmo.tasks.text_classification import TextClassification
from llmo.tasks.token_classification import TokenClassification
from llmo.training import dropout, model
from llmo.training.model import build, set_training

TASK = TextClassification(["a", "b", "c"], max_length=32)
TAGS = TokenClassification(["O", "B-x", "I-x"], max_length=32)


def trained(base: Path, **keys: object) -> set[str]:
    return {name for name, _ in build(base, TASK, TrainSpec(**keys)).trainable()}


def test_full_trains_all(base: Path) -> None:
    built = build(base, TASK, TrainSpec())
    assert built.trained == built.parameters == sum(p.numel() for p in built.model.parameters())
    config = built.network.config
    assert (config.id2label, config.label2id) == ({0: "a", 1: "b", 2: "c"}, {"a": 0, "b": 1, "c": 2})
    assert config.problem_type == "single_label_classification"


def test_head_trains_the_head_and_its_pooler(base: Path) -> None:
    names = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert trained(base, method="head") == names
    built = build(base, TAGS, TrainSpec(method="head"))
    assert {name for name, _ in built.trainable()} == {"classifier.weight", "classifier.bias"}


def test_last_n_trains_the_last_layers_and_the_head(base: Path) -> None:
    names = trained(base, method="last-n", last_n=1)
    assert {n.split(".layer.")[1][0] for n in names if ".layer." in n} == {"1"}
    assert "classifier.weight" in names
    assert not any("embeddings" in n for n in names)
    with pytest.raises(SpecError, match="last_n is 3, but the model has 2 layers"):
        build(base, TASK, TrainSpec(method="last-n", last_n=3))


def test_lora_adapts_every_linear_layer_of_the_trunk(base: Path) -> None:
    built = build(base, TASK, TrainSpec(method="lora", lora=LoraSpec(rank=4)))
    assert len(built.adapted) == 12
    names = {name for name, _ in built.trainable()}
    assert all("lora_" in n or "classifier" in n or "pooler" in n for n in names)
    plain = build(base, TASK, TrainSpec())
    assert built.parameters == plain.parameters
    per_layer = 4 * (4 * (32 + 32) + (32 + 64) + (64 + 32))
    assert built.trained == 2 * per_layer + (32 * 32 + 32) + (3 * 32 + 3)


def test_lora_modules_can_be_named(base: Path) -> None:
    built = build(base, TASK, TrainSpec(method="lora", lora=LoraSpec(target_modules=["query", "value"])))
    assert {name.split(".")[-1] for name in built.adapted} == {"query", "value"}
    with pytest.raises(SpecError, match="no linear layer is called q_proj") as raised:
        build(base, TASK, TrainSpec(method="lora", lora=LoraSpec(target_modules=["q_proj"])))
    assert "query" in raised.value.hint


def test_lora_merged_says_the_same_and_lora_does_something(base: Path) -> None:
    built = build(base, TASK, TrainSpec(method="lora"))
    ids = torch.randint(5, 60, (4, 12))
    built.model.eval()
    with torch.no_grad():
        untouched = built.model(input_ids=ids).logits
        for name, p in built.trainable():
            if "lora_B" in name:
                p.normal_(0, 0.2)
        adapted = built.model(input_ids=ids).logits
        plain = model.merged(built)
        assert type(plain) is BertForSequenceClassification
        assert torch.allclose(plain(input_ids=ids).logits, adapted, atol=1e-5)
    assert (adapted - untouched).abs().max().item() > 1e-3


def test_frozen_layers_run_without_dropout(base: Path) -> None:
    built = build(base, TASK, TrainSpec(method="last-n", last_n=1))
    set_training(built.model)
    bert = built.network.bert
    assert not bert.embeddings.dropout.training
    assert not bert.encoder.layer[0].output.dropout.training
    assert bert.encoder.layer[1].output.dropout.training
    assert built.network.dropout.training


def test_dropout_can_be_set(base: Path) -> None:
    built = build(base, TASK, TrainSpec(dropout=0.25))
    assert {m.p for m in built.model.modules() if isinstance(m, dropout.ByteDropout)} == {0.25}
    assert not any(isinstance(m, nn.Dropout) and m.p for m in built.model.modules())


def test_new_weights_follow_the_seed(base: Path) -> None:
    heads = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        heads.append(build(base, TASK, TrainSpec()).network.classifier.weight.detach().clone())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_head_for_the_same_labels_is_kept_and_for_others_renewed(base: Path, tmp_path: Path) -> None:
    first = build(base, TASK, TrainSpec())
    first.network.save_pretrained(tmp_path)
    old = first.network.classifier.weight
    same = build(tmp_path, TASK, TrainSpec())
    assert torch.equal(same.network.classifier.weight, old)
    for labels in (["x", "y", "z"], ["a", "b"]):
        other = build(tmp_path, TextClassification(labels, 32), TrainSpec())
        assert other.network.classifier.out_features == len(labels)
        assert not torch.equal(other.network.classifier.weight[:2], old[:2])
        assert torch.equal(other.network.bert.pooler.dense.weight, first.network.bert.pooler.dense.weight)


def test_a_text_longer_than_the_positions_is_refused(base: Path) -> None:
    with pytest.raises(SpecError, match="at most 128 tokens"):
        build(base, TextClassification(["a", "b"], 129), TrainSpec())


def changed(base: Path, folder: Path, **config: object) -> Path:
    shutil.copytree(base, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def test_weights_of_another_shape_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="do not fit the config: they have another shape"):
        build(changed(base, tmp_path / "m", hidden_size=48, num_attention_heads=4), TASK, TrainSpec())


def test_missing_layers_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="they lack 16 tensors"):
        build(changed(base, tmp_path / "m", num_hidden_layers=3), TASK, TrainSpec())


def test_an_architecture_without_this_task_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no AutoModelForTokenClassification"):
        build(changed(base, tmp_path / "m", model_type="clip"), TAGS, TrainSpec())


def test_a_checkpoint_without_a_pooler_gets_a_new_one(base: Path, tmp_path: Path) -> None:
    folder = changed(base, tmp_path / "m")
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if "pooler" not in k}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert build(folder, TASK, TrainSpec()).network.bert.pooler.dense.weight.abs().sum().item() > 0
