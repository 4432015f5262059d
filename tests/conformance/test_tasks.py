"""What every task must keep to, whatever it is: add a task's rows to CASES and it is held to the same contract.

Tasks that write instead of label stand in WRITING: they share the card, the encoding of rows and the measuring. Those
whose labels are a whole vocabulary stand in VOCABULARY: what is learnt of a row is not what it is measured on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from llmo import plugins
from llmo.errors import InputError
from llmo.tasks.base import Encoding, Task, gathered, sequences
from llmo.tasks.card import load_tokenizer
from llmo.tasks.extractive_qa import ExtractiveQA
from llmo.tasks.metrics import Tally
from llmo.tasks.regression import Regression
from llmo.tasks.sentence_embedding import SentenceEmbedding
from llmo.tasks.token_classification import TokenClassification
from support.tiny import (
    chat_rows,
    history_rows,
    pair_rows,
    question_rows,
    rated_rows,
    span_rows,
    text_rows,
    tiny_history_model,
    tiny_model,
    tiny_tokenizer,
)
from support.tiny_chat import tiny_chat_model, tiny_chat_tokenizer


@dataclass
class Case:
    task: Task
    rows: list[dict[str, Any]]
    encodings: list[Encoding]
    targets: list[np.ndarray]


CASES = {
    "text-classification": ("text-classification", text_rows(40, seed=1)),
    "text-classification, multi-label": ("text-classification", text_rows(40, seed=2, multi_label=True)),
    "token-classification": ("token-classification", span_rows(40, seed=3)),
    "extractive-qa": ("extractive-qa", question_rows(40, seed=7)),
    "regression": ("regression", rated_rows(40, seed=8)),
    "sentence-embedding": ("sentence-embedding", pair_rows(40, seed=9)),
    "sentence-embedding, scored": ("sentence-embedding", pair_rows(40, seed=10, kind="scored")),
    "sentence-embedding, triples": ("sentence-embedding", pair_rows(40, seed=11, kind="triples")),
}


WRITING = {
    "generation": ("generation", chat_rows(40, seed=4)),
    "generation, plain text": ("generation", chat_rows(40, seed=5, shape="text")),
    "generation, preferences": ("generation", chat_rows(40, seed=6, shape="preference")),
}


VOCABULARY = {
    "masked-lm": ("masked-lm", text_rows(40, seed=7)),
    "next-item": ("next-item", history_rows(40, seed=8)),
}


def test_every_registered_task_is_here() -> None:
    assert set(plugins.names("llmo.tasks")) == {name for name, _ in (CASES | WRITING | VOCABULARY).values()}


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    name, rows = CASES[request.param]
    task = plugins.load("llmo.tasks", name).from_rows(rows, max_length=64, options={"multi_label": None})
    encodings = task.encode_rows(tiny_tokenizer(), rows)
    return Case(task, rows, encodings, [task.target(r, e) for r, e in zip(rows, encodings, strict=True)])


def perfect(task: Task, target: np.ndarray, encoding: Encoding) -> np.ndarray:
    """Logits that say exactly the target."""
    if isinstance(task, ExtractiveQA):
        places = np.arange(len(encoding.input_ids))[:, None] == target[:2]
        return np.where(places, 9.0, -9.0).astype(np.float32)
    if isinstance(task, Regression):
        return target
    if isinstance(task, SentenceEmbedding):
        rng = np.random.default_rng(int(np.abs(target).sum() * 1000) + len(encoding.input_ids))
        one, other = np.linalg.qr(rng.normal(size=(32, 2)))[0].T
        same = target[0] if task.scored else 1.0
        return np.stack([one, same * one + np.sqrt(1 - same**2) * other]).astype(np.float32)
    if target.dtype.kind == "f":
        return (target * 18 - 9).astype(np.float32)
    return np.eye(len(task.labels), dtype=np.float32)[np.maximum(target, 0)] * 9


def wrong(task: Task, logits: np.ndarray) -> np.ndarray:
    """What says the contrary."""
    return logits * [[1], [-1]] if isinstance(task, SentenceEmbedding) else -logits


def gold(row: dict[str, Any]) -> Any:
    if "answers" in row:
        return row["answers"][0] if row["answers"] else None
    if "value" in row:
        return pytest.approx(row["value"], abs=1e-4)
    if "pair" in row:
        return pytest.approx(1.0 if row["score"] is None else row["score"], abs=1e-5)
    if "spans" in row:
        return sorted((s["start"], s["end"], s["label"]) for s in row["spans"])
    return row.get("label", row.get("labels"))


def given(answer: dict[str, Any]) -> Any:
    if "entities" in answer:
        return sorted((e["start"], e["end"], e["label"]) for e in answer["entities"])
    for name in ("answer", "value", "similarity"):
        if name in answer:
            return answer[name]
    return answer.get("label", answer.get("labels"))


def said(case: Case) -> list[np.ndarray]:
    return [perfect(case.task, t, e) for t, e in zip(case.targets, case.encodings, strict=True)]


def test_card_round_trip(case: Case) -> None:
    card = json.loads(json.dumps(case.task.to_card()))
    again = plugins.load("llmo.tasks", card["task"]).from_card(card)
    assert again.to_card() == case.task.to_card()
    assert type(again) is type(case.task)
    assert (again.metric, again.problem_type) == (case.task.metric, case.task.problem_type)


def test_perfect_logits_are_measured_as_perfect_and_answer_the_gold(case: Case) -> None:
    logits = said(case)
    measured = case.task.measure(logits, case.rows, case.encodings)
    assert measured[case.task.metric] == 1.0
    for each, row, encoding in zip(logits, case.rows, case.encodings, strict=True):
        assert given(case.task.answer(each, encoding, case.task.asked(row))) == gold(row)


def test_worse_logits_measure_worse(case: Case) -> None:
    logits = [wrong(case.task, x) for x in said(case)]
    assert case.task.measure(logits, case.rows, case.encodings)[case.task.metric] < 0.5


def test_intervals_hold_their_values(case: Case) -> None:
    logits = said(case)
    logits[::2] = [wrong(case.task, x) for x in logits[::2]]
    measured = case.task.measure(logits, case.rows, case.encodings)
    found = case.task.intervals(case.task.tally(logits, case.rows, case.encodings))
    assert set(found) == set(measured)
    for name, interval in found.items():
        assert interval["value"] == pytest.approx(measured[name])
        assert interval["low"] <= interval["high"]
        assert 0.0 <= interval["low"] <= interval["high"] <= 1.0 or "value" in case.rows[0] or "score" in case.rows[0]
    main = found[case.task.metric]
    assert main["low"] < main["value"] < main["high"]


def test_a_split_measured_in_parts_is_the_split_measured_whole(case: Case) -> None:
    logits = said(case)
    if case.task.whole:
        pytest.skip("its rows are measured among all others")
    logits[::3] = [wrong(case.task, x) for x in logits[::3]]
    whole = case.task.tally(logits, case.rows, case.encodings)
    cuts = [slice(0, 5), slice(5, 30), slice(30, None)]
    parts = Tally.merged([case.task.tally(logits[c], case.rows[c], case.encodings[c]) for c in cuts])
    assert case.task.details(parts) == case.task.details(whole)
    assert case.task.intervals(parts, seed=4) == case.task.intervals(whole, seed=4)


def test_the_counts_of_single_rows_are_those_of_the_split(case: Case) -> None:
    """Two models are compared by them."""
    logits = [wrong(case.task, x) if i % 3 == 0 else x for i, x in enumerate(said(case))]
    whole = case.task.tally(logits, case.rows, case.encodings)
    alone = Tally.of_sums(np.stack(case.task.counted(logits, case.rows, case.encodings)))
    assert (alone.counts == whole.counts).all()
    assert (alone.times == whole.times).all()


def test_agreement_is_reflexive_and_sees_a_change(case: Case) -> None:
    for logits, encoding in zip(said(case), case.encodings, strict=True):
        if not logits.any():
            continue  # the mean value: its contrary is the same
        assert case.task.agree(logits, logits.copy(), encoding)
        assert case.task.agree(logits, logits.copy())
        assert not case.task.agree(logits, wrong(case.task, logits), encoding)


def test_offsets_are_of_the_text_as_sent(case: Case) -> None:
    for row, encoding in zip(case.rows, case.encodings, strict=True):
        assert len(encoding.offsets) == len(encoding.word_ids) == len(encoding.input_ids)
        longest = max(len(text) for text in case.task.given(case.task.asked(row)))
        assert all(0 <= start <= end <= longest for start, end in encoding.offsets)


def test_encoding_one_text_or_many_is_the_same(case: Case) -> None:
    tokenizer = tiny_tokenizer()
    for row, encoding in zip(case.rows[:8], case.encodings, strict=False):
        assert case.task.encode(tokenizer, [case.task.asked(row)]) == [encoding]


def test_truncation_is_as_long_as_allowed_and_said(case: Case) -> None:
    if isinstance(case.task, ExtractiveQA):
        pytest.skip("it reads a long context in windows")
    task = type(case.task).from_card(case.task.to_card() | {"max_length": 8})
    text = "good time " * 20
    (encoding,) = task.encode(tiny_tokenizer(), [text])
    assert (len(encoding.input_ids), encoding.length, encoding.truncated) == (8, 42, True)
    labels = len(task.labels) or 32
    shape = (8, labels) if isinstance(task, TokenClassification) else (labels,)
    assert task.answer(np.zeros(shape, np.float32), encoding, text)["truncated"] is True


def test_texts_of_other_names_are_refused(case: Case) -> None:
    for asked in ({}, {"txt": "a"}, {**dict.fromkeys(case.task.asks, "a"), "other": "b"}):
        with pytest.raises(InputError, match=f"a model for {case.task.name} takes") as caught:
            case.task.encode(tiny_tokenizer(), [asked])
        assert all(name in caught.value.hint for name in case.task.asks)


def test_what_is_read_apart_comes_together_again(case: Case) -> None:
    parts = sequences(case.encodings)
    assert [i for part in parts for i in part] == [i for e in case.encodings for i in e.input_ids]
    shown = [np.array([[i] for i in part], np.float32) for part in parts]
    again = gathered(shown, case.encodings)
    assert [x[:, 0].tolist() for x in again] == [e.input_ids for e in case.encodings]


def test_answers_are_plain_json(case: Case) -> None:
    answer = case.task.answer(said(case)[0], case.encodings[0], case.task.asked(case.rows[0]))
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer


def test_details_are_plain_json(case: Case) -> None:
    logits = said(case)
    details = case.task.details(case.task.tally(logits, case.rows, case.encodings))
    assert json.loads(json.dumps(details, allow_nan=False)) == details


def test_loss_is_lowest_at_the_targets_and_has_a_gradient(case: Case) -> None:
    lessons = case.task.lessons(tiny_tokenizer(), case.rows[: 1 if case.task.group == 1 else 4])
    targets = [case.task.target(row, encoding) for row, encoding in lessons]
    logits = [perfect(case.task, target, e) for target, (_, e) in zip(targets, lessons, strict=True)]
    if isinstance(case.task, SentenceEmbedding):  # all vectors of a batch in one, each row's one after the other
        if case.task.negatives:
            logits = [np.concatenate([x, -x[:1]]) for x in logits]
        good = torch.from_numpy(np.concatenate(logits))
        target = torch.from_numpy(np.repeat(np.stack(targets), case.task.group, axis=0))
        flip = torch.tensor([1.0, -1.0, -1.0][: case.task.group]).repeat(len(targets))[:, None]
        bad = (good * flip).requires_grad_()
    else:
        good, target = torch.from_numpy(logits[0][None]), torch.from_numpy(targets[0][None])
        bad = (-good).requires_grad_()
    loss = case.task.loss(bad, target, None)
    loss.backward()
    assert float(case.task.loss(good, target, None)) < loss.item()
    assert bad.grad is not None
    assert float(bad.grad.abs().sum()) > 0
    assert case.task.mass(target, None) > 0


def test_class_counts_cover_every_label(case: Case) -> None:
    if not case.task.has_classes:
        with pytest.raises(InputError, match="has no classes"):
            case.task.class_counts(case.targets)
        return
    counts = case.task.class_counts(case.targets)
    assert counts.shape == (len(case.task.labels),)
    assert counts.sum() > 0


@pytest.fixture(params=sorted(WRITING))
def writing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, rows = WRITING[request.param]
    cls = plugins.load("llmo.tasks", name)
    base = tiny_chat_model(tmp_path_factory.mktemp("base") / "model")
    task = cls.from_rows(rows, max_length=200, options={"multi_label": None, **cls.of_base(base)})
    encodings = task.encode_rows(tiny_chat_tokenizer(), rows)
    return Case(task, rows, encodings, [task.target(r, e) for r, e in zip(rows, encodings, strict=True)])


def likelihoods(case: Case, probability: float) -> list[np.ndarray]:
    """What a model says that gives every learnt token the same probability, and thinks it the likeliest."""
    counts = [int((target != -100).sum()) for target in case.targets]
    return [np.tile(np.array([[np.log(probability), 1.0]], np.float32), (count, 1)) for count in counts]


def test_a_writing_tasks_card_round_trip(writing: Case) -> None:
    card = json.loads(json.dumps(writing.task.to_card()))
    again = plugins.load("llmo.tasks", card["task"]).from_card(card)
    assert again.to_card() == writing.task.to_card()
    assert again.encode_rows(tiny_chat_tokenizer(), writing.rows) == writing.encodings


def test_likelier_answers_measure_better(writing: Case) -> None:
    task = writing.task
    found = [
        task.measure(likelihoods(writing, p), writing.rows, writing.encodings)[task.metric] for p in (0.1, 0.5, 0.999)
    ]
    assert found == sorted(found, reverse=not task.higher_is_better)
    assert found[1] == pytest.approx(2.0, rel=1e-4)
    assert task.drop(found[1], found[0]) > 0 > task.drop(found[1], found[2])


def test_a_writing_split_measured_in_parts_is_the_split_measured_whole(writing: Case) -> None:
    task, outputs = writing.task, likelihoods(writing, 0.3)
    outputs[::3] = [x * 2 for x in outputs[::3]]
    whole = task.tally(outputs, writing.rows, writing.encodings)
    cuts = [slice(0, 5), slice(5, 30), slice(30, None)]
    parts = Tally.merged([task.tally(outputs[c], writing.rows[c], writing.encodings[c]) for c in cuts])
    assert task.details(parts) == task.details(whole)
    assert task.intervals(parts, seed=4) == task.intervals(whole, seed=4)
    main = task.intervals(whole)[task.metric]
    assert main["low"] < main["value"] < main["high"]


def test_every_answer_ends_with_an_end_token_that_is_learnt(writing: Case) -> None:
    for target in writing.targets:
        assert target[0] == -100
        learnt = np.flatnonzero(target != -100)
        for last in learnt[np.append(np.diff(learnt) > 1, True)]:
            assert target[last] in writing.task.end_ids  # type: ignore[attr-defined]


def test_writing_truncation_is_as_long_as_allowed_and_said(writing: Case) -> None:
    task = type(writing.task).from_card(writing.task.to_card() | {"max_length": 24})
    for encoding, whole in zip(task.encode_rows(tiny_chat_tokenizer(), writing.rows), writing.encodings, strict=True):
        assert len(encoding.input_ids) == min(24, len(whole.input_ids))
        assert (encoding.length, encoding.truncated) == (whole.length, whole.length > 24)


def test_a_writing_task_has_no_labels_to_answer_with(writing: Case) -> None:
    task, logits = writing.task, np.zeros((4, 10), np.float32)
    for ask in (
        lambda: task.answer(logits, writing.encodings[0], ""),
        lambda: task.agree(logits, logits),
        lambda: task.class_counts([]),
        lambda: task.mass(torch.zeros(1), None),
        lambda: task.loss(torch.zeros(1), torch.zeros(1), None),
    ):
        with pytest.raises(InputError, match="has no labels: it writes its answers"):
            ask()


@pytest.fixture(params=sorted(VOCABULARY))
def placed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, rows = VOCABULARY[request.param]
    cls = plugins.load("llmo.tasks", name)
    make = tiny_history_model if name == "next-item" else tiny_model
    base = make(tmp_path_factory.mktemp("base") / "model")
    task = cls.from_rows(rows, max_length=64, options=cls.of_base(base))
    tokenizer = load_tokenizer(base)
    lessons = task.lessons(tokenizer, rows)
    return Case(task, rows, task.encode_rows(tokenizer, rows), [task.target(row, e) for row, e in lessons])


def sure(case: Case, logit: float) -> list[np.ndarray]:
    """What is kept of a model's logits that gives what is to be found this much more than all else."""
    found = []
    for row, encoding in zip(case.rows, case.encodings, strict=True):
        if case.task.labels:
            logits = np.arange(len(case.task.labels), dtype=np.float32) * -1e-3
            logits[case.task.labels.index(row["label"])] += logit
        else:
            answers = case.task.target(row, encoding)
            logits = np.zeros((len(answers), case.task.vocabulary), np.float32)  # type: ignore[attr-defined]
            logits[np.arange(len(answers)), np.maximum(answers, 0)] += logit
        found.append(case.task.kept(logits, encoding))
    return found


def test_a_vocabulary_tasks_card_round_trip(placed: Case) -> None:
    card = json.loads(json.dumps(placed.task.to_card()))
    again = plugins.load("llmo.tasks", card["task"]).from_card(card)
    assert again.to_card() == placed.task.to_card()
    outputs = sure(placed, 3.0)
    assert again.measure(outputs, placed.rows, placed.encodings) == placed.task.measure(
        outputs, placed.rows, placed.encodings
    )


def test_something_is_learnt_of_every_row(placed: Case) -> None:
    assert len(placed.targets) >= len(placed.rows)
    assert all((target != -100).any() for target in placed.targets)


def test_surer_of_the_right_measures_better(placed: Case) -> None:
    task = placed.task
    found = [task.measure(sure(placed, x), placed.rows, placed.encodings)[task.metric] for x in (-9.0, 0.0, 9.0)]
    assert found == sorted(found, reverse=not task.higher_is_better)
    assert task.drop(found[2], found[0]) > 0


def test_a_vocabulary_split_measured_in_parts_is_the_split_measured_whole(placed: Case) -> None:
    task, outputs = placed.task, sure(placed, 3.0)
    outputs[::3] = sure(placed, -1.0)[::3]
    whole = task.tally(outputs, placed.rows, placed.encodings)
    cuts = [slice(0, 5), slice(5, 30), slice(30, None)]
    parts = Tally.merged([task.tally(outputs[c], placed.rows[c], placed.encodings[c]) for c in cuts])
    assert json.loads(json.dumps(task.details(parts), allow_nan=False)) == task.details(whole)
    assert task.intervals(parts, seed=4) == task.intervals(whole, seed=4)
    main = task.intervals(whole)[task.metric]
    assert main["low"] < main["value"] < main["high"]
