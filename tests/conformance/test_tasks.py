"""What every task must keep to, whatever it is: add a task's rows to CASES and it is held to the same contract."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from llmo import plugins
from llmo.tasks.base import Encoding, Task
from llmo.tasks.metrics import Tally
from support.tiny import span_rows, text_rows, tiny_tokenizer


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
}


def test_every_registered_task_is_here() -> None:
    assert set(plugins.names("llmo.tasks")) == {name for name, _ in CASES.values()}


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    name, rows = CASES[request.param]
    task = plugins.load("llmo.tasks", name).from_rows(rows, max_length=64, options={"multi_label": None})
    encodings = task.encode(tiny_tokenizer(), [row["text"] for row in rows])
    return Case(task, rows, encodings, [task.target(r, e) for r, e in zip(rows, encodings, strict=True)])


def perfect(task: Task, target: np.ndarray) -> np.ndarray:
    """Logits that say exactly the target."""
    if target.dtype.kind == "f":
        return (target * 18 - 9).astype(np.float32)
    return np.eye(len(task.labels), dtype=np.float32)[np.maximum(target, 0)] * 9


def gold(row: dict[str, Any]) -> Any:
    if "spans" in row:
        return sorted((s["start"], s["end"], s["label"]) for s in row["spans"])
    return row.get("label", row.get("labels"))


def given(answer: dict[str, Any]) -> Any:
    if "entities" in answer:
        return sorted((e["start"], e["end"], e["label"]) for e in answer["entities"])
    return answer.get("label", answer.get("labels"))


def test_card_round_trip(case: Case) -> None:
    card = json.loads(json.dumps(case.task.to_card()))
    again = plugins.load("llmo.tasks", card["task"]).from_card(card)
    assert again.to_card() == case.task.to_card()
    assert type(again) is type(case.task)
    assert (again.metric, again.problem_type) == (case.task.metric, case.task.problem_type)


def test_perfect_logits_are_measured_as_perfect_and_answer_the_gold(case: Case) -> None:
    logits = [perfect(case.task, t) for t in case.targets]
    measured = case.task.measure(logits, case.rows, case.encodings)
    assert measured[case.task.metric] == 1.0
    for each, row, encoding in zip(logits, case.rows, case.encodings, strict=True):
        assert given(case.task.answer(each, encoding, row["text"])) == gold(row)


def test_worse_logits_measure_worse(case: Case) -> None:
    logits = [-perfect(case.task, t) for t in case.targets]
    assert case.task.measure(logits, case.rows, case.encodings)[case.task.metric] < 0.5


def test_intervals_hold_their_values(case: Case) -> None:
    logits = [perfect(case.task, t) for t in case.targets]
    logits[::2] = [-x for x in logits[::2]]
    measured = case.task.measure(logits, case.rows, case.encodings)
    found = case.task.intervals(case.task.tally(logits, case.rows, case.encodings))
    assert set(found) == set(measured)
    for name, interval in found.items():
        assert interval["value"] == pytest.approx(measured[name])
        assert 0.0 <= interval["low"] <= interval["high"] <= 1.0
    main = found[case.task.metric]
    assert main["low"] < main["value"] < main["high"]


def test_a_split_measured_in_parts_is_the_split_measured_whole(case: Case) -> None:
    logits = [perfect(case.task, t) for t in case.targets]
    logits[::3] = [-x for x in logits[::3]]
    whole = case.task.tally(logits, case.rows, case.encodings)
    cuts = [slice(0, 5), slice(5, 30), slice(30, None)]
    parts = Tally.merged([case.task.tally(logits[c], case.rows[c], case.encodings[c]) for c in cuts])
    assert case.task.details(parts) == case.task.details(whole)
    assert case.task.intervals(parts, seed=4) == case.task.intervals(whole, seed=4)


def test_agreement_is_reflexive_and_sees_a_change(case: Case) -> None:
    for target, encoding in zip(case.targets, case.encodings, strict=True):
        logits = perfect(case.task, target)
        assert case.task.agree(logits, logits.copy(), encoding)
        assert case.task.agree(logits, logits * 0.5)
        assert not case.task.agree(logits, -logits, encoding)


def test_offsets_are_of_the_text_as_sent(case: Case) -> None:
    for row, encoding in zip(case.rows, case.encodings, strict=True):
        assert len(encoding.offsets) == len(encoding.word_ids) == len(encoding.input_ids)
        assert all(0 <= start <= end <= len(row["text"]) for start, end in encoding.offsets)


def test_encoding_one_text_or_many_is_the_same(case: Case) -> None:
    tokenizer = tiny_tokenizer()
    for row, encoding in zip(case.rows[:8], case.encodings, strict=False):
        assert case.task.encode(tokenizer, [row["text"]]) == [encoding]


def test_truncation_is_as_long_as_allowed_and_said(case: Case) -> None:
    task = type(case.task).from_card(case.task.to_card() | {"max_length": 8})
    text = "good time " * 20
    (encoding,) = task.encode(tiny_tokenizer(), [text])
    assert (len(encoding.input_ids), encoding.length, encoding.truncated) == (8, 42, True)
    shape = (
        (len(task.labels),) if case.targets[0].dtype.kind == "f" or case.targets[0].ndim == 0 else (8, len(task.labels))
    )
    assert task.answer(np.zeros(shape, np.float32), encoding, text)["truncated"] is True


def test_answers_are_plain_json(case: Case) -> None:
    answer = case.task.answer(perfect(case.task, case.targets[0]), case.encodings[0], case.rows[0]["text"])
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer


def test_details_are_plain_json(case: Case) -> None:
    logits = [perfect(case.task, t) for t in case.targets]
    details = case.task.details(case.task.tally(logits, case.rows, case.encodings))
    assert json.loads(json.dumps(details, allow_nan=False)) == details


def test_loss_is_lowest_at_the_targets_and_has_a_gradient(case: Case) -> None:
    target = torch.from_numpy(case.targets[0][None])
    good = torch.from_numpy(perfect(case.task, case.targets[0])[None])
    bad = (-good).requires_grad_()
    loss = case.task.loss(bad, target, None)
    loss.backward()
    assert float(case.task.loss(good, target, None)) < loss.item()
    assert bad.grad is not None
    assert float(bad.grad.abs().sum()) > 0
    assert case.task.mass(target, None) > 0


def test_class_counts_cover_every_label(case: Case) -> None:
    counts = case.task.class_counts(case.targets)
    assert counts.shape == (len(case.task.labels),)
    assert counts.sum() > 0
