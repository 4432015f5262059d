"""Next item: what is learnt of a history, how an item's rank is counted, and what is answered."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from llmo.errors import InputError, ModelError
from llmo.tasks.next_item import NextItem
from llmo.training import pieces
from support.tiny import tiny_model

HISTORIES = ["a b c d", "c b a", "b a"]
TOKENIZER = pieces.items(HISTORIES, None)
ITEMS = ("a", "b", "c", "d")  # the commonest first


def task(**options: object) -> NextItem:
    given = {"catalogue": ITEMS, **options}
    return NextItem.from_rows([{"text": "a b"}], max_length=8, options=given)


def test_every_item_is_the_next_one_of_those_before_it() -> None:
    ((row, lesson),) = task().lessons(TOKENIZER, [{"text": "a b c d"}])
    assert lesson.input_ids == [TOKENIZER.token_to_id(item) for item in "abc"]
    assert [ITEMS[i] for i in task().target(row, lesson)] == ["b", "c", "d"]


def test_an_unknown_item_is_not_learnt_but_what_follows_it_is() -> None:
    ((row, lesson),) = task().lessons(TOKENIZER, [{"text": "a new c"}])
    assert task().target(row, lesson).tolist() == [-100, ITEMS.index("c")]


def test_a_long_history_is_learnt_in_pieces_and_every_item_once() -> None:
    rng = np.random.default_rng(0)
    text = " ".join(rng.choice(ITEMS, 29))
    lessons = task().lessons(TOKENIZER, [{"text": text}])
    assert all(len(lesson.input_ids) <= 8 for _, lesson in lessons)
    learnt = [ITEMS[i] for row, lesson in reversed(lessons) for i in task().target(row, lesson)]
    assert learnt == text.split()[1:]


def test_what_is_cut_off_is_the_beginning() -> None:
    (encoding,) = task().encode(TOKENIZER, ["d " + "a b " * 4 + "c"])
    assert [TOKENIZER.id_to_token(i) for i in encoding.input_ids] == [*"babababc"]
    assert (encoding.length, encoding.truncated) == (10, True)


def measured(logits: list[float], text: str, label: str | None, **options: object) -> dict[str, float]:
    made = NextItem(tuple("abcdefghijklmnop"), 8, **options)  # type: ignore[arg-type]
    row = {"text": text, "label": label}
    return made.measure([np.array(logits, np.float32)], [row], [])


def test_the_rank_is_among_the_items_that_may_be_answered() -> None:
    falling = [-float(i) for i in range(16)]
    assert measured(falling, "p", "a")["ndcg@10"] == 1.0
    assert measured(falling, "p", "c")["ndcg@10"] == pytest.approx(1 / math.log2(4), abs=1e-6)
    assert measured(falling, "a b", "c")["ndcg@10"] == 1.0
    assert measured(falling, "a b", "c", repeats=True)["ndcg@10"] == pytest.approx(1 / math.log2(4), abs=1e-6)
    assert measured(falling, "p", "j")["recall@10"] == 1.0
    assert measured(falling, "p", "k")["recall@10"] == 0.0


def test_a_model_that_says_the_same_of_all_items_finds_none() -> None:
    assert measured([0.0] * 16, "p", "a")["recall@10"] == 0.0


def test_an_item_that_cannot_be_answered_is_missed() -> None:
    assert measured([1.0] + [0.0] * 15, "p", "new")["recall@10"] == 0.0
    assert measured([1.0] + [0.0] * 15, "a p", "a")["recall@10"] == 0.0
    assert measured([1.0] + [0.0] * 15, "a p", "a", repeats=True)["recall@10"] == 1.0


def test_a_training_row_is_measured_on_its_last_item() -> None:
    assert measured([-float(i) for i in range(16)], "c a", None)["ndcg@10"] == 1.0


def test_the_answer_leaves_out_what_the_user_has_seen() -> None:
    logits = np.array([3.0, 2.0, 1.0, 0.0], np.float32)
    (encoding,) = task().encode(TOKENIZER, ["a new"])
    answer = task().answer(logits, encoding, "a new")
    assert [item["item"] for item in answer["items"]] == ["b", "c", "d"]
    assert sum(item["score"] for item in answer["items"]) == pytest.approx(1.0)
    assert answer["unknown"] == ["new"]
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    again = task(repeats=True).answer(logits, encoding, "a new")
    assert [item["item"] for item in again["items"]] == ["a", "b", "c", "d"]


def test_a_history_of_unknown_items_has_no_answer() -> None:
    (encoding,) = task().encode(TOKENIZER, ["new newer"])
    with pytest.raises(InputError, match="no item of this history is in the catalogue, such as 'new'"):
        task().answer(np.zeros(4, np.float32), encoding, "new newer")


def test_agreement_is_of_most_of_the_best_items() -> None:
    made, rng = NextItem(tuple(str(i) for i in range(100))), np.random.default_rng(1)
    logits = rng.normal(size=100).astype(np.float32)
    assert made.agree(logits, logits + rng.normal(size=100).astype(np.float32) * 1e-3)
    assert not made.agree(logits, -logits)


def test_the_card_round_trip() -> None:
    made = task(repeats=True)
    assert NextItem.from_card(json.loads(json.dumps(made.to_card()))).to_card() == made.to_card()


def test_a_base_that_reads_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="reads text"):
        NextItem.of_base(tiny_model(tmp_path / "base"))
