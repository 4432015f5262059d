"""Words, offsets, tags and entity-level figures, on tokenisers of three families."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmo.errors import DataError
from llmo.tasks.token_classification import TokenClassification
from support.tiny import span_rows, tiny_tokenizer

SENTENCES = [
    "alice went to london, then to new york 👍🏽.",
    "我在北京爱了 王芳!",
    "José and Zürich: café (paris) — e\u0301te\u0301 in ＬＯＮＤＯＮ",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, show_progress=False, special_tokens=["<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


FAMILIES = {"wordpiece": tiny_tokenizer, "byte-level": byte_level, "metaspace": metaspace}


def perfect(task: TokenClassification, target: np.ndarray) -> np.ndarray:
    return np.eye(len(task.labels), dtype=np.float32)[np.where(target < 0, 0, target)] * 9


def spans_of(text: str, *names: str) -> list[dict[str, object]]:
    return [{"start": text.index(n), "end": text.index(n) + len(n), "label": "x"} for n in names]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("text", "names"),
    [
        (SENTENCES[0], ["alice", "london", "new york"]),
        (SENTENCES[1], ["王芳"]),
        (SENTENCES[2], ["José", "Zürich", "paris", "ＬＯＮＤＯＮ"]),
        ("👍🏽👍🏽 bob smith 👨‍👩‍👧 in 北京", ["bob smith", "北京"]),
    ],
)
def test_spans_come_back_with_the_characters_that_were_sent(family: str, text: str, names: list[str]) -> None:
    task = TokenClassification(["O", "B-x", "I-x"])
    row = {"text": text, "spans": spans_of(text, *names)}
    (encoding,) = task.encode(FAMILIES[family](), [text])
    answer = task.answer(perfect(task, task.target(row, encoding)), encoding, text)
    assert [(e["start"], e["end"]) for e in answer["entities"]] == [(s["start"], s["end"]) for s in row["spans"]]
    assert [e["text"] for e in answer["entities"]] == names


@pytest.mark.parametrize("family", FAMILIES)
def test_words_do_not_hold_punctuation_or_white_space(family: str) -> None:
    task = TokenClassification(["O", "B-x", "I-x"])
    text = "to london, then."
    (encoding,) = task.encode(FAMILIES[family](), [text])
    words: dict[int, list[tuple[int, int]]] = {}
    for word, offset in zip(encoding.word_ids, encoding.offsets, strict=True):
        if word is not None:
            words.setdefault(word, []).append(offset)
    assert [text[w[0][0] : w[-1][1]] for w in words.values()] == ["to", "london", ",", "then", "."]


def test_first_piece_carries_the_label() -> None:
    task = TokenClassification(["O", "B-x", "I-x"])
    text = "zzq in new york"
    (encoding,) = task.encode(tiny_tokenizer(), [text])
    target = task.target({"text": text, "spans": spans_of(text, "zzq", "new york")}, encoding)
    # [CLS] z ##z ##q in new york [SEP]; "york" is a word of the vocabulary
    assert target.tolist() == [-100, 1, -100, -100, 0, 1, 2, -100]


def test_adjacent_entities_of_one_type_stay_apart() -> None:
    task = TokenClassification(["O", "B-x", "I-x"])
    text = "paris london"
    row = {"text": text, "spans": spans_of(text, "paris", "london")}
    (encoding,) = task.encode(tiny_tokenizer(), [text])
    assert len(task.decode(perfect(task, task.target(row, encoding)), encoding, text)) == 2


def test_an_inside_tag_that_continues_nothing_begins_an_entity() -> None:
    task = TokenClassification(["O", "B-x", "I-x", "B-y", "I-y"])
    text = "paris london good time"
    (encoding,) = task.encode(tiny_tokenizer(), [text])
    logits = perfect(task, np.array([0, 1, 4, 0, 2, 0]))
    found = [(text[e.start : e.end], e.label) for e in task.decode(logits, encoding, text)]
    assert found == [("paris", "x"), ("london", "y"), ("time", "x")]


def test_score_is_the_mean_over_words() -> None:
    task = TokenClassification(["O", "B-x", "I-x"])
    text = "new york"
    (encoding,) = task.encode(tiny_tokenizer(), [text])
    logits = np.log(np.array([[1, 1, 1], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [1, 1, 1]], np.float32))
    (entity,) = task.decode(logits, encoding, text)
    assert entity.score == pytest.approx(0.7, abs=1e-6)


def test_entities_beyond_the_truncation_count_as_missed() -> None:
    task = TokenClassification(["O", "B-x", "I-x"], max_length=6)
    text = "paris good good good good london"
    row = {"text": text, "spans": spans_of(text, "paris", "london")}
    (encoding,) = task.encode(tiny_tokenizer(), [text])
    found = task.measure([perfect(task, task.target(row, encoding))], [row], [encoding])
    assert (found["precision"], found["recall"]) == (1.0, 0.5)


def test_a_word_cut_in_two_is_answered_whole() -> None:
    task = TokenClassification(["O", "B-x", "I-x"], max_length=5)
    text = "good zzqqz time"
    row = {"text": text, "spans": spans_of(text, "zzqqz")}
    (encoding,) = task.encode(tiny_tokenizer(), [text])
    assert encoding.truncated
    (entity,) = task.decode(perfect(task, task.target(row, encoding)), encoding, text)
    assert text[entity.start : entity.end] == "zzqqz"


def test_boundaries_are_strict() -> None:
    task = TokenClassification(["O", "B-x", "I-x"])
    text = "in new york"
    row = {"text": text, "spans": spans_of(text, "new york")}
    (encoding,) = task.encode(tiny_tokenizer(), [text])
    assert task.measure([perfect(task, np.array([0, 0, 1, 0, 0]))], [row], [encoding])["f1"] == 0.0


def test_overlapping_spans_are_learnt_once_and_the_rest_is_missed() -> None:
    task = TokenClassification(["O", "B-x", "I-x"])
    text = "new york"
    row = {"text": text, "spans": spans_of(text, "new york", "york")}
    (encoding,) = task.encode(tiny_tokenizer(), [text])
    assert task.target(row, encoding).tolist() == [-100, 1, 2, -100]
    assert task.measure([perfect(task, task.target(row, encoding))], [row], [encoding])["recall"] == 0.5


def test_labels_are_found() -> None:
    task = TokenClassification.from_rows(span_rows(40), max_length=32, options={})
    assert task.labels == ("O", "B-person", "I-person", "B-place", "I-place")
    assert task.types == ("person", "place")
    with pytest.raises(DataError, match="no training row carries"):
        TokenClassification.from_rows([{"text": "x", "spans": []}], max_length=32, options={})


def test_an_unknown_type_is_named() -> None:
    task = TokenClassification(["O", "B-place", "I-place"])
    text = "london"
    (encoding,) = task.encode(tiny_tokenizer(), [text])
    row = {"text": text, "spans": [{"start": 0, "end": 6, "label": "places"}]}
    with pytest.raises(DataError, match="did you mean 'place'"):
        task.target(row, encoding)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 2.0, 1.0])])
def test_parts_weighted_by_mass_add_up_to_the_whole(weights: torch.Tensor | None) -> None:
    task = TokenClassification(["O", "B-x", "I-x"])
    torch.manual_seed(0)
    logits = torch.randn(4, 5, 3)
    targets = torch.tensor([[-100, 0, 1, 2, -100], [-100, 0, -100, -100, -100], [1, 1, 2, 0, 0], [-100] * 5])
    whole = task.loss(logits, targets, weights, 0.1)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), weights, ignore_index=-100, label_smoothing=0.1
    )
    parts = sum(
        task.loss(logits[s], targets[s], weights, 0.1) * task.mass(targets[s], weights)
        for s in (slice(0, 1), slice(1, 4))
    )
    assert torch.allclose(whole, expected, atol=1e-6)
    assert torch.allclose(torch.as_tensor(parts) / task.mass(targets, weights), whole, atol=1e-6)
    assert float(task.loss(logits[3:], targets[3:], weights)) == 0.0  # nothing to learn from, and no NaN


def test_agreement_looks_at_words_when_it_can() -> None:
    task = TokenClassification(["O", "B-x", "I-x"])
    (encoding,) = task.encode(tiny_tokenizer(), ["zzq"])
    a, b = perfect(task, np.array([0, 1, 0, 0, 0])), perfect(task, np.array([2, 1, 2, 2, 2]))
    assert task.agree(a, b, encoding)
    assert not task.agree(a, b)


def test_an_empty_text_has_no_entities() -> None:
    task = TokenClassification(["O", "B-x", "I-x"])
    (encoding,) = task.encode(tiny_tokenizer(), [""])
    assert task.answer(np.zeros((2, 3), np.float32), encoding, "") == {"entities": [], "tokens": 2}
