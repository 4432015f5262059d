"""No conversation and no question is on two sides of a division, whatever its answers."""

from __future__ import annotations

import json
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmo.data.chat.groups import gather, prompts
from llmo.data.conversation import Conversation
from llmo.data.row import Row
from llmo.data.split import divide

SHARES = {"test": 0.2, "dev": 0.1}


def talk(*said: str) -> Conversation:
    return Conversation([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)])


def row(*said: str) -> Row:
    conversation = talk(*said)
    return Row(conversation.transcript(), None, "/".join(said), conversation=conversation)


def test_the_prompts_of_a_conversation():
    one, other = prompts(talk("Hi", "Hello", "Why?", "So.")), prompts(talk("HI ", "Hello", "How?", "So."))
    assert len(one) == 2
    assert one[0] == other[0] == prompts(talk("hi", "Go away"))[0]
    assert one[1] != other[1]
    chosen = Conversation([{"role": "user", "content": "Hi"}], chosen=talk("", "Hello").messages[1:], rejected=[])
    assert prompts(chosen) == one[:1]


SAID = st.lists(st.sampled_from("abcde"), min_size=1, max_size=3).flatmap(
    lambda asked: st.tuples(*(st.tuples(st.just(q), st.sampled_from("xyz")) for q in asked))
)


@given(st.lists(SAID, min_size=1, max_size=60), st.integers(0, 3), st.randoms(use_true_random=False))
def test_a_prompt_is_on_one_side(talks, seed, rng):
    rows = [row(*(text for pair in said for text in pair)) for said in talks]
    gather(rows)
    chosen = divide(rows, SHARES, seed, whole_groups=True)
    sides = defaultdict(set)
    for one, split in zip(rows, chosen, strict=True):
        sides[prompts(one.conversation)[-1]].add(split)
    assert all(len(found) == 1 for found in sides.values())
    order = list(range(len(rows)))
    rng.shuffle(order)
    assert divide([rows[i] for i in order], SHARES, seed, whole_groups=True) == [chosen[i] for i in order]


def test_conversations_that_share_their_first_question_stay_together():
    rows = [row(f"Question {i // 3}?", f"Answer {i}.", f"More {i}?", "Yes.") for i in range(90)]
    assert gather(rows) == []
    chosen = divide(rows, SHARES, 13, whole_groups=True)
    assert Counter(chosen) == {"train": 63, "test": 18, "dev": 9}
    for i in range(0, 90, 3):
        assert len(set(chosen[i : i + 3])) == 1


def test_a_greeting_that_all_share_does_not_hold_them_together():
    rows = [row("Hi", "Hello", f"Question {i // 2}?", f"Answer {i}.") for i in range(60)]
    rows += [row("Hi", "Hello"), row("Hi", "Good day")]
    (note,) = gather(rows)
    assert note.startswith("60 conversations begin like many others")
    chosen = divide(rows, SHARES, 13, whole_groups=True)
    assert set(chosen) == {"train", "dev", "test"}
    assert all(chosen[i] == chosen[i + 1] for i in range(0, 62, 2))


def test_two_questions_are_too_few_to_part(tmp_path, import_):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "ab"[i % 2], "completion": f"answer {i}"}) for i in range(10)))
    got = import_(path, task="generation")
    assert got.info["rows"] == {"read": 10, "train": 10, "dev": 0, "test": 0, "dropped": 0}
    assert "there are too few rows for test: it is empty" in got.notes


@pytest.mark.parametrize("how", ["near", "none"])
def test_a_question_that_the_source_itself_holds_out(tmp_path, import_, how):
    lines = [{"prompt": f"q{i}", "completion": "a", "split": "train"} for i in range(5)]
    lines += [{"prompt": "Q1", "completion": "another", "split": "test"}]
    lines += [{"prompt": "q2", "completion": "b", "split": "dev"}, {"prompt": "q9", "completion": "b", "split": "test"}]
    lines += [{"prompt": "q3", "completion": "A", "split": "test"}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    got = import_(path, task="generation", clean={"drop_duplicates": how})
    if how == "none":
        assert got.dropped() == {}
        return
    assert got.dropped() == {"leak": ["a.jsonl:4"], "prompt_leak": ["a.jsonl:2", "a.jsonl:3"]}
    assert "the same question as a.jsonl:6 (test)" in [row["detail"] for row in got.data.dropped()]
    assert any("2 rows were dropped because they ask what another split holds out" in note for note in got.notes)


def test_copies_of_conversations_go(tmp_path, import_):
    said = " ".join(f"word{i}" for i in range(100))
    rows = [
        ("Hi", "Hello"),
        ("HI", "hello "),
        ("Hi", "Hello!"),
        ("Tell", said),
        ("Tell", said.replace("word50", "that")),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": q, "completion": a}) for q, a in rows))
    got = import_(path, task="generation")
    assert got.info["dropped"] == {"duplicate": 1, "near_duplicate": 1}
    assert import_(path, task="generation", clean={"drop_duplicates": "exact"}).info["dropped"] == {"duplicate": 1}
