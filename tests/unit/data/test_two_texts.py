"""Questions with contexts, pairs, and texts with a number: what is read of them, and what is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmo.errors import DataError

CONTEXT = "Alice went to  Paris, and Bob stayed in Rome until 1999."
ALICE = {"text": "Alice", "answer_start": 0}
ROME = {"text": "in Rome", "answer_start": CONTEXT.index("in Rome")}


def lines(tmp_path: Path, rows: list[dict[str, Any]], name: str = "a.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def squad(tmp_path: Path, articles: int = 12) -> Path:
    def asked(i: int) -> list[dict[str, Any]]:
        return [
            {"id": f"{i}a", "question": "Who went to Paris?", "answers": [ALICE, {**ALICE, "text": "Alice went "}]},
            {"id": f"{i}b", "question": "Where was Bob?", "answers": [ROME]},
            {"id": f"{i}c", "question": "Why?", "answers": [], "is_impossible": True},
        ]  # fmt: skip

    data = [
        {"title": f"T{i}", "paragraphs": [{"context": f"{CONTEXT} That was article {i}.", "qas": asked(i)}]}
        for i in range(articles)
    ]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": data}), encoding="utf-8")
    return path


def test_squad_is_read_and_answers_stay_where_they_are_when_the_context_is_cleaned(tmp_path, import_):
    found = import_(squad(tmp_path), task="extractive-qa")
    assert found.info["rows"]["read"] == 36
    assert found.info["unanswerable"] == 12
    assert found.info["columns"] == {"text": "question", "pair": "context", "answer": "answers", "id": "id"}
    rows = {row["id"]: row for row in found.rows()}
    assert rows["3a"]["answers"] == ["Alice", "Alice went"]
    assert rows["3b"]["pair"].startswith("Alice went to Paris, and")
    assert rows["3b"]["answer_start"] == CONTEXT.index("in Rome") - 1
    assert (rows["3c"]["answers"], rows["3c"]["answer_start"]) == ([], None)
    for row in rows.values():
        for answer in row["answers"][:1]:
            assert row["pair"][row["answer_start"] :].startswith(answer)


@pytest.mark.parametrize("value", [3, ["one", "two"], [], [{"context": "one"}]])
def test_a_column_that_is_called_paragraphs_makes_no_article(tmp_path, import_, value):
    rows = [{"text": f"text {i}", "label": "ab"[i % 2], "paragraphs": value} for i in range(20)]
    assert import_(lines(tmp_path, rows)).info["rows"]["read"] == 20


def test_questions_on_one_long_context_are_no_copies(tmp_path, import_):
    contexts = [" ".join(f"{side}{i}" for i in range(400)) for side in "abcdef"]
    rows = [
        {"question": f"Which is number {i}?", "context": context, "answer": f"{context[0]}{i}"}
        for context in contexts
        for i in (3, 7)
    ]
    assert import_(lines(tmp_path, [*rows, rows[0]]), task="extractive-qa").dropped() == {"duplicate": ["a.jsonl:13"]}


def test_questions_on_one_context_stay_on_one_side(tmp_path, import_):
    found = import_(squad(tmp_path), task="extractive-qa")
    assert found.info["rows"]["dropped"] == 0
    sides: dict[str, set[str]] = {}
    for split in ("train", "dev", "test"):
        for row in found.data.split(split):
            sides.setdefault(row["pair"], set()).add(split)
    assert {len(splits) for splits in sides.values()} == {1}


def test_a_context_that_another_split_holds_out_leaves_train(tmp_path, import_):
    row = {"question": "Who?", "context": CONTEXT, "answer": "Alice"}
    rows = [row | {"split": "test"}, row | {"question": "Where?", "answer": "Rome", "split": "train"}]
    rows += [{"question": "Who?", "context": f"Bob {i}", "answer": "Bob", "split": "train"} for i in range(4)]
    found = import_(lines(tmp_path, rows), task="extractive-qa")
    assert found.dropped() == {"prompt_leak": ["a.jsonl:2"]}


def test_the_layout_of_datasets_and_single_answers_are_read(tmp_path, import_):
    many = {"question": "Who?", "context": CONTEXT, "answers": {"text": ["Bob"], "answer_start": [26]}}
    one = {"question": "When?", "context": CONTEXT, "answers": 1999}
    listed = {"question": "Where?", "context": CONTEXT, "answers": ["Paris", "to  Paris"]}
    rows = [many, one, listed, {"question": "Why?", "context": CONTEXT, "answers": None}]
    found = import_(lines(tmp_path, rows), task="extractive-qa")
    by_question = {row["text"]: row for row in found.rows()}
    assert by_question["Who?"]["answers"] == ["Bob"]
    assert by_question["When?"]["answers"] == ["1999"]
    assert by_question["Where?"]["answers"] == ["Paris", "to Paris"]
    assert by_question["Why?"]["answers"] == []


def test_an_answer_that_is_there_twice_is_said(tmp_path, import_):
    rows = [{"question": f"Which {i}?", "context": f"a b{i} a b{i}", "answer": f"b{i}"} for i in range(3)]
    found = import_(lines(tmp_path, rows), task="extractive-qa")
    assert any("3 answers are in their context several times" in note for note in found.notes)


BAD_QUESTIONS = [
    ({"question": "Who?", "context": CONTEXT, "answers": "Carol"}, "the answer 'Carol' is not in the context"),
    ({"question": "Who?", "context": CONTEXT, "answers": [{"text": "Bob", "answer_start": 3}]},
     "the answer at 3 should read 'Bob', but the context there is 'ce '"),
    ({"question": "Who?", "context": CONTEXT, "answers": [{"text": "Bob", "answer_start": -3}]}, "should read 'Bob'"),
    ({"question": "Who?", "context": CONTEXT, "answers": [{"text": "Bob", "answer_start": "x"}]}, "whole number"),
    ({"question": "Who?", "context": CONTEXT, "answers": [{"text": True}]}, "an answer is a text"),
    ({"question": "Who?", "context": CONTEXT, "answers": {"text": ["Bob"], "answer_start": []}}, "1 answers and 0"),
    ({"question": "Who?", "context": ["a"], "answers": []}, "the pair is a list, not a string"),
    ({"paragraphs": 3}, "`paragraphs` must be a list"),
    ({"paragraphs": [{"qas": []}]}, "a paragraph is an object with its `context`"),
    ({"paragraphs": [{"context": "a", "qas": [3]}]}, "question 1: a question is an object"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "says"), BAD_QUESTIONS, ids=[says for _, says in BAD_QUESTIONS])
def test_a_bad_question_is_refused_with_its_line(tmp_path, import_, row, says):
    good = {"question": "Who?", "context": CONTEXT, "answers": ["Bob"]}
    with pytest.raises(DataError) as caught:
        import_(lines(tmp_path, [good, row]), task="extractive-qa")
    assert says in str(caught.value)
    assert caught.value.hint
    assert caught.value.where.startswith("a.jsonl:2")


def test_questions_without_an_answer_column_or_an_answer(tmp_path, import_):
    row = {"question": "Who?", "context": CONTEXT}
    with pytest.raises(DataError, match="no column is called like a label column"):
        import_(lines(tmp_path, [row]), task="extractive-qa")
    with pytest.raises(DataError, match="no row has an answer"):
        import_(lines(tmp_path, [row | {"answer": ""}]), task="extractive-qa")
    with pytest.raises(DataError, match=r"2 of 2 rows lack something; the first is a.jsonl:1: no context"):
        import_(lines(tmp_path, [row | {"context": " ", "answer": ""}] * 2), task="extractive-qa")


def csv(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_values_are_numbers_as_they_stand(tmp_path, import_):
    body = "text,stars\n" + "".join(f"text number {i},{i / 2 - 1}\n" for i in range(20)) + "unknown,\n"
    found = import_(csv(tmp_path, body), task="regression")
    assert found.dropped() == {"no_label": ["a.csv:22"]}
    assert sorted(row["value"] for row in found.rows()) == [i / 2 - 1 for i in range(20)]
    assert found.info["values"] == {"lowest": -1.0, "mean": 3.75, "highest": 8.5}


def test_one_text_with_two_values_is_a_conflict(tmp_path, import_):
    body = "text,value\nsame text,1\nsame text,2\n" + "".join(f"other {i},{i}\n" for i in range(5))
    assert import_(csv(tmp_path, body), task="regression").dropped() == {"conflict": ["a.csv:2", "a.csv:3"]}


@pytest.mark.parametrize("value", ["much", "nan", "inf", "1e999", "3;5"])
def test_what_is_no_finite_number_is_refused_with_its_line(tmp_path, import_, value):
    with pytest.raises(DataError, match=r"a\.csv:3: 'value' must be a finite number") as caught:
        import_(csv(tmp_path, f"text,value\na,1\nb,{value}\n"), task="regression")
    assert "data.label" in caught.value.hint


def test_values_that_are_all_the_same_or_mostly_missing(tmp_path, import_):
    with pytest.raises(DataError, match="every row has the value 3"):
        import_(csv(tmp_path, "text,value\na,3\nb,3.0\n"), task="regression")
    with pytest.raises(DataError, match=r"2 of 3 rows lack something; the first is a.csv:2: no value"):
        import_(csv(tmp_path, "text,value\na,\nb,\nc,3\n"), task="regression")


def test_pairs_triples_and_scores_are_told_apart_by_their_columns(tmp_path, import_):
    rows = [{"anchor": f"query {i}", "positive": f"answer {i}"} for i in range(10)]
    assert import_(lines(tmp_path, rows), task="sentence-embedding").info["shape"] == "pairs"
    triples = import_(lines(tmp_path, [row | {"negative": "none"} for row in rows]), task="sentence-embedding")
    assert triples.info["shape"] == "triples"
    assert {row["negative"] for row in triples.rows()} == {"none"}
    scored = [{"sentence1": f"query {i}", "sentence2": f"answer {i}", "score": i / 9} for i in range(10)]
    found = import_(lines(tmp_path, scored), task="sentence-embedding")
    assert found.info["shape"] == "scored pairs"
    assert sorted(row["score"] for row in found.rows()) == [i / 9 for i in range(10)]


def test_a_pair_that_is_held_out_is_not_learnt_with_another_negative(tmp_path, import_):
    rows = [{"anchor": f"query {i % 8}", "positive": f"answer {i % 8}", "negative": f"other {i}"} for i in range(16)]
    given = [row | {"split": "test" if i in (0, 1) else "train"} for i, row in enumerate(rows)]
    found = import_(lines(tmp_path, given), task="sentence-embedding")
    assert found.dropped() == {"leak": ["a.jsonl:9", "a.jsonl:10"]}
    texts = [set(found.texts(split)) for split in ("train", "test")]
    assert not texts[0] & texts[1]


def test_columns_of_pairs_can_be_told(tmp_path, import_):
    rows = [{"left": f"query {i}", "right": f"answer {i}", "how": i} for i in range(10)]
    told = {"text": "left", "pair": "right", "label": "how"}
    found = import_(lines(tmp_path, rows), task="sentence-embedding", **told)
    assert found.info["columns"] == told
    with pytest.raises(DataError, match="no column 'rigth'; did you mean 'right'"):
        import_(lines(tmp_path, rows), task="sentence-embedding", **(told | {"pair": "rigth"}))


@pytest.mark.parametrize(
    ("task", "columns", "says"),
    [
        ("sentence-embedding", {"text": "a", "pair": "a"}, "both text and pair"),
        ("extractive-qa", {"pair": "b", "label": "b"}, "both pair and label"),
        ("regression", {"text": "b", "label": "b"}, "both text and label"),
    ],
)
def test_a_column_in_two_roles_is_refused(tmp_path, import_, task, columns, says):
    with pytest.raises(DataError, match=f"cannot be {says}"):
        import_(csv(tmp_path, "a,b,text\nt,1,u\n"), task=task, **columns)


def test_pairs_of_one_text_stay_on_one_side_and_empty_ones_go(tmp_path, import_):
    rows = [{"a": f"query {i % 12}", "b": f"answer {i}"} for i in range(48)]
    found = import_(lines(tmp_path, [*rows, {"a": "alone", "b": " "}]), task="sentence-embedding")
    assert found.dropped() == {"empty": ["a.jsonl:49"]}
    texts = [set(found.texts(split)) for split in ("train", "dev", "test")]
    assert all(texts)
    assert not texts[0] & texts[1] | texts[0] & texts[2] | texts[1] & texts[2]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("a\nt\n", "no column is called like a pair column"),
        ("a,b\nt,\nu,x\nv,\n", "2 of 3 rows lack something; the first is a.csv:2: no pair"),
        ("a,b,negative\nt,x,y\nu,x,\n", "a.csv:3: this row has no negative, and others have one"),
        ("a,b,score\nt,x,1\nu,y,1\n", "every pair has the score 1"),
        ("a,b,label\nt,x,yes\n", "a.csv:2: 'label' must be a finite number"),
    ],
)
def test_bad_pairs(tmp_path, import_, body, says):
    with pytest.raises(DataError) as caught:
        import_(csv(tmp_path, body), task="sentence-embedding")
    assert says in str(caught.value)
    assert caught.value.hint
