"""The runner's tasks say what LLMO's own say of the same logits, to the last bit, whatever tokeniser and text are."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from llmo.compression.edge import kinds
from llmo.compression.edge.frame import Problem, alike
from llmo.compression.edge.frame import Task as Own
from llmo.errors import InputError
from llmo.tasks.base import Task
from llmo.tasks.extractive_qa import ExtractiveQA
from llmo.tasks.token_classification import TokenClassification
from llmo.types import Asked
from support.tiny import span_rows, tiny_tokenizer

LETTERS = [*"abc XYZ 12.,-_'!?() \n\t", *"我北京สวัสดีこんカタ👍🏽éåü\u0301نסي ａ１"]
TAGS = ("O", "B-p", "I-p", "B-q", "I-q")
ROUNDS = 120


def byte_level() -> Tokenizer:
    """As RoBERTa's: pieces are bytes, and offsets hold the space before a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    known = {"special_tokens": ["<s>", "</s>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    texts = [row["text"] for row in span_rows(100, seed=1)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False, **known))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=False)
    return tokenizer


def both(task: Task, own: Own, tokenizer: Tokenizer, asked: Asked, rng: np.random.Generator) -> tuple[Any, Any]:
    """What LLMO and the runner say of the same random logits."""
    (encoding,) = task.encode(tokenizer, [asked])
    texts = task.given(asked)
    seen = own.encode(texts)
    assert [token for one in seen for token in one.ids] == encoding.input_ids
    said = rng.normal(0, 2, (len(encoding.input_ids), len(task.labels))).astype(np.float32)
    cuts = np.cumsum([len(one.ids) for one in seen])[:-1]
    said[[0, *cuts]] += rng.choice([0.0, 8.0])  # the first tokens, which may stand for no answer
    answer = own.answer(np.split(said, cuts), seen, list(texts))
    cut = {"truncated": True} if any(one.length > len(one.ids) for one in seen) else {}
    return task.answer(said, encoding, asked), {**answer, "tokens": sum(one.length for one in seen), **cut}


@pytest.mark.parametrize("make", [tiny_tokenizer, byte_level])
@pytest.mark.parametrize("length", [6, 40])
def test_entities(make: Callable[[], Tokenizer], length: int) -> None:
    rng, letters = np.random.default_rng(length), random.Random(length)
    tokenizer = make()
    task = TokenClassification(TAGS, length)
    own = kinds.TokenClassification(task.to_card(), Tokenizer.from_str(tokenizer.to_str()))
    found = 0
    for _ in range(ROUNDS):
        text = "".join(letters.choices(LETTERS, k=letters.randint(1, 60)))
        wanted, answer = both(task, own, tokenizer, text, rng)
        assert alike(answer, wanted, 0.0), text
        found += len(wanted["entities"])
    assert found > ROUNDS


@pytest.mark.parametrize("make", [tiny_tokenizer, byte_level])
@pytest.mark.parametrize("unanswerable", [False, True])
def test_spans_of_a_context(make: Callable[[], Tokenizer], unanswerable: bool) -> None:
    rng, letters = np.random.default_rng(7), random.Random(7)
    tokenizer = make()
    task = ExtractiveQA(max_length=40, unanswerable=unanswerable)
    own = kinds.ExtractiveQA(task.to_card(), Tokenizer.from_str(tokenizer.to_str()))
    none = 0
    for _ in range(ROUNDS):
        context = "".join(letters.choices(LETTERS, k=letters.randint(1, 300)))
        asked = {"question": "".join(letters.choices("abc ?", k=letters.randint(1, 14))), "context": context}
        wanted, answer = both(task, own, tokenizer, asked, rng)
        assert alike(answer, wanted, 0.0), asked
        none += wanted["answer"] is None and bool(context.strip())
    assert (none > 0) == unanswerable
    asked = {"question": "a b " * 20, "context": "here"}
    with pytest.raises(InputError, match=r"a question has [0-9]+ tokens"):
        task.encode(tokenizer, [asked])
    with pytest.raises(Problem, match=r"a question has [0-9]+ tokens"):
        own.encode(list(asked.values()))
