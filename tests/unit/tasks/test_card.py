"""What lies beside the weights is read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmo.errors import ModelError
from llmo.tasks import card
from llmo.tasks.text_classification import TextClassification
from support.tiny import tiny_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny_model(tmp_path / "model")
    card.write_card(folder, {"task": TextClassification(["a", "b"], 16).to_card(), "engine": "torch"})
    return folder


def test_card_round_trip(model: Path) -> None:
    assert card.read_card(model)["engine"] == "torch"
    task = card.load_task(model)
    assert isinstance(task, TextClassification)
    assert (task.labels, task.max_length, task.multi_label) == (("a", "b"), 16, False)


def test_tokenizer_comes_without_padding_or_truncation(model: Path) -> None:
    tokenizer = card.load_tokenizer(model)
    assert tokenizer.padding is None
    assert tokenizer.truncation is None


def test_a_changed_tokenizer_is_refused(model: Path) -> None:
    path = model / "tokenizer.json"
    path.write_text(path.read_text().replace('"market"', '"markets"'))
    with pytest.raises(ModelError, match="not the tokeniser"):
        card.load_tokenizer(model)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        card.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no llmo.json"),
        ("{", "not valid JSON"),
        ("[]", "says nothing of a task"),
        ('{"format": 9, "task": {}}', "format 9"),
    ],
)
def test_unreadable_cards_say_why(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / card.CARD).write_text(content)
    with pytest.raises(ModelError, match=message):
        card.read_card(tmp_path)


def test_a_card_whose_task_lacks_keys_is_refused(model: Path) -> None:
    card.write_card(model, {"task": {"task": "text-classification"}})
    with pytest.raises(ModelError, match="cannot be built"):
        card.load_task(model)


def test_golden_round_trip(tmp_path: Path) -> None:
    golden = [{"text": "été 👍", "input_ids": [1, 2], "logits": [0.5, -0.25]}]
    card.write_golden(tmp_path, golden)
    assert card.read_golden(tmp_path) == golden
