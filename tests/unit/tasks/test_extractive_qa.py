"""Windows, answers at their edges, and what stands where there is none."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from llmo.errors import DataError, InputError, ModelError, SpecError
from llmo.tasks.extractive_qa import MOST_WINDOWS, ExtractiveQA
from support.tiny import question_rows, tiny_tokenizer

FILL = "good time today "
CONTEXT = FILL * 12 + "bob smith was in zürich 北京! " + FILL * 6


def row(answer: str, context: str = CONTEXT, question: str = "who was there?") -> dict[str, Any]:
    found = {"answers": [answer], "answer_start": context.index(answer)} if answer else {"answers": []}
    return {"id": "r", "text": question, "pair": context, "answer_start": None, **found}


def task(**more: Any) -> ExtractiveQA:
    return ExtractiveQA(max_length=32, **more)


def said(made: ExtractiveQA, some: dict[str, Any], boost: float = 9.0) -> tuple[np.ndarray, Any]:
    """Logits that point at the answer in every window that holds it, and at nothing in the others."""
    (encoding,) = made.encode_rows(tiny_tokenizer(), [some])
    logits = np.zeros((len(encoding.input_ids), 2), np.float32)
    starts = (0, *encoding.ends)
    for begin, window in zip(starts, encoding.apart(), strict=False):
        start, end = made.target(some, window)[:2]
        logits[begin + start, 0] += boost
        logits[begin + end, 1] += boost
    return logits, encoding


@pytest.mark.parametrize("answer", ["bob smith", "zürich", "北京", "北", "good", "bob smith was in zürich 北京!"])
def test_an_answer_anywhere_in_a_long_context_is_found_as_it_was_sent(answer: str) -> None:
    some = row(answer)
    logits, encoding = said(task(), some)
    assert len(encoding.ends) > 2
    found = task().answer(logits, encoding, task().asked(some))
    assert found["answer"] == answer == CONTEXT[found["start"] : found["end"]]
    assert found["start"] == some["answer_start"]
    assert task().measure([logits], [some], [encoding]) == {"f1": 1.0, "exact_match": 1.0}


def test_windows_are_those_of_plain_tokenisers_and_overlap() -> None:
    (encoding,) = task().encode(tiny_tokenizer(), [{"question": "who was there?", "context": CONTEXT}])
    windows = encoding.apart()
    assert all(len(window.input_ids) <= 32 for window in windows)
    question = windows[0].word_ids.count(None)
    seen = [[o for o, w in zip(win.offsets, win.word_ids, strict=True) if w is not None] for win in windows]
    for one, after in pairwise(seen):
        assert one[-10:] == after[:10], "a third of 32 tokens is shared"
    assert {w.word_ids.count(None) for w in windows} == {question}
    assert seen[0][0][0] == 0
    assert seen[-1][-1][1] == len(CONTEXT.rstrip())


def test_lessons_hold_the_answer_or_nothing_of_it() -> None:
    some = row("bob smith was in zürich 北京")
    lessons = task().lessons(tiny_tokenizer(), [some])
    answered = 0
    for _, window in lessons:
        start, end, first, last = task().target(some, window)
        text = CONTEXT[window.offsets[start][0] : window.offsets[end][1]] if start else ""
        shown = CONTEXT[window.offsets[first][0] : window.offsets[last][1]]
        assert text == some["answers"][0] if start else "bob" not in shown or "京" not in shown
        answered += bool(start)
    assert answered
    assert len(lessons) < len(task().encode_rows(tiny_tokenizer(), [some])[0].apart()), "those that cut it are left out"


def test_an_answer_longer_than_the_overlap_can_be_lost() -> None:
    long = (FILL * 12).strip()
    assert task().lessons(tiny_tokenizer(), [row(long)]) == []
    assert len(task().lessons(tiny_tokenizer(), [row("")])) > 2


def test_no_answer_is_the_first_token_and_only_where_it_was_learnt() -> None:
    none = row("")
    for unanswerable in (True, False):
        made = task(unanswerable=unanswerable)
        logits, encoding = said(made, none)
        found = made.answer(logits, encoding, made.asked(none))
        assert (found["answer"] is None) == unanswerable
        assert ("start" in found) != unanswerable
        assert 0 <= found["score"] <= 1
    logits, encoding = said(task(unanswerable=True), none)
    rows = [none, row("bob smith")]
    right = said(task(unanswerable=True), rows[1])
    found = task(unanswerable=True).measure([logits, right[0]], rows, [encoding, right[1]])
    assert found == {"f1": 1.0, "exact_match": 1.0, "answered_f1": 1.0, "no_answer_accuracy": 1.0}


def test_question_and_padding_are_no_answers() -> None:
    """The loss and the answer look at the context alone, whatever the logits say of other tokens."""
    some = row("bob", "carol and bob smith")
    logits, encoding = said(task(), some)
    outside = np.array([word is None for word in encoding.word_ids])
    outside[0] = False
    loud = logits + 50.0 * outside[:, None]
    assert task().answer(loud, encoding, task().asked(some))["answer"] == "bob"
    target = torch.from_numpy(task().target(some, encoding)[None])
    padded = np.concatenate([loud, np.full((5, 2), 50, np.float32)])
    losses = [float(task().loss(torch.from_numpy(x[None]), target, None)) for x in (logits, loud, padded)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-6)


def test_an_answer_does_not_end_before_it_starts_nor_go_on_for_ever() -> None:
    context = " ".join("abcdefghijklmnopqrstuvwxyz" * 2)
    made = ExtractiveQA(max_length=128)
    some = row("b", context)
    (encoding,) = made.encode_rows(tiny_tokenizer(), [some])
    inside = [i for i, word in enumerate(encoding.word_ids) if word is not None]
    logits = np.zeros((len(encoding.input_ids), 2), np.float32)
    logits[inside[40], 0] = logits[inside[2], 1] = 5
    found = made.answer(logits, encoding, made.asked(some))
    assert found["start"] < found["end"]
    logits[inside[0], 0] = logits[inside[50], 1] = 9
    found = made.answer(logits, encoding, made.asked(some))
    assert found["end"] - found["start"] < 60


def test_a_very_long_context_is_cut_and_said() -> None:
    (encoding,) = task().encode(tiny_tokenizer(), [{"question": "who?", "context": FILL * 2000}])
    assert len(encoding.ends) == MOST_WINDOWS
    assert encoding.truncated
    logits = np.zeros((len(encoding.input_ids), 2), np.float32)
    found = task().answer(logits, encoding, {"question": "", "context": FILL * 2000})
    assert found["truncated"] is True


def test_what_cannot_be_asked_or_learnt() -> None:
    with pytest.raises(InputError, match="a question has 20 tokens, and this model reads questions of at most 16"):
        task().encode(tiny_tokenizer(), [{"question": "good " * 20, "context": CONTEXT}])
    with pytest.raises(InputError, match="lone surrogate"):
        task().encode(tiny_tokenizer(), [{"question": "good?", "context": "a \ud800"}])
    with pytest.raises(InputError, match="takes question and context, not question"):
        task().encode(tiny_tokenizer(), ["good?"])
    with pytest.raises(DataError, match="no training row has an answer"):
        ExtractiveQA.from_rows([row("")], max_length=64, options={})
    with pytest.raises(SpecError, match="do not fit"):
        ExtractiveQA.from_rows([row("bob")], max_length=31, options={})
    bare = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    bare.pre_tokenizer = Whitespace()
    with pytest.raises(ModelError, match="no token before a text"):
        task().encode(bare, [{"question": "a", "context": "a a"}])


def test_rows_of_a_data_set_say_whether_no_answer_can_be_learnt() -> None:
    rows = question_rows(8)
    assert ExtractiveQA.from_rows(rows, max_length=64, options={}).unanswerable
    assert not ExtractiveQA.from_rows([r for r in rows if r["answers"]], max_length=64, options={}).unanswerable
