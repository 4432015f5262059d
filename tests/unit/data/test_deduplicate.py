"""Copies go, what only looks alike stays, no copy of a held-out text is left in train."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmo.data.deduplicate import deduplicate, text_key
from llmo.data.near import near_copies, words
from llmo.data.row import Drop, Row, Span

VOCABULARY = [f"word{i}" for i in range(400)]


def row(text, label="a", split=None, place=""):
    return Row(text, (label,), place or text[:20], split=split)


def prose(seed: int, count: int = 200) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=count)


def reasons(dropped):
    return sorted((d.reason.value, d.row.place) for d in dropped)


def true_jaccard(a: str, b: str) -> float:
    grams = [{tuple(w[i : i + 5]) for i in range(len(w) - 4)} for w in (words(text_key(a)), words(text_key(b)))]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_the_same_text_in_another_case_or_width_is_a_copy():
    kept, dropped = deduplicate(
        [row("Good  Day!"), row("good day!"), row("Ｇood day!"), row("good day?")], "exact", 0.9
    )
    assert len(kept) == 2
    assert {d.reason.value for d in dropped} == {"duplicate"}


def test_a_near_copy_goes_and_its_similarity_is_told():
    base = prose(1)
    changed = [*base[:100], "another", *base[101:]]
    kept, dropped = deduplicate([row(" ".join(base)), row(" ".join(changed)), row(" ".join(prose(2)))], "near", 0.9)
    assert len(kept) == 2
    (one,) = dropped
    assert one.reason == "near_duplicate"
    assert one.detail.startswith(f"{true_jaccard(' '.join(base), ' '.join(changed)):.2f} like")
    assert deduplicate([row(" ".join(base)), row(" ".join(changed))], "exact", 0.9)[1] == []


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_the_true_similarity_decides_on_both_sides_of_the_threshold(threshold):
    """Pairs of known similarity: all clearly above are found, none below is."""
    rng = random.Random(int(threshold * 100))
    keys, expected = [], set()
    for pair in range(60):
        base = [f"p{pair}w{i}" for i in range(150)]
        other = list(base)
        for at in rng.sample(range(150), rng.randint(0, 12)):
            other[at] = f"p{pair}x{at}"
        keys += [" ".join(base), " ".join(other)]
        if true_jaccard(keys[-2], keys[-1]) >= threshold:
            expected.add(2 * pair + 1)
    copies = near_copies(keys, threshold)
    assert set(copies) == expected
    for at, (original, similarity) in copies.items():
        assert similarity == pytest.approx(true_jaccard(keys[at], keys[original]))


def test_chinese_is_compared_by_characters():
    text = "今天的天气非常好我们决定去公园散步然后回家吃饭看电视睡觉" * 1 + "".join(chr(0x4E00 + i) for i in range(100))
    copies = near_copies([text, text.replace("公园", "花园"), "".join(chr(0x5E00 + i) for i in range(120))], 0.9)
    assert set(copies) == {1}
    assert copies[1][1] == pytest.approx(true_jaccard(text, text.replace("公园", "花园")))


def test_short_texts_have_no_near_copies_and_emoji_count():
    texts = [
        "that was ok :)",
        "that was ok :(",
        "turn it on",
        "turn it off",
        "i like this very much 👍",
        "i like this very much 👎",
    ]
    assert deduplicate([row(t) for t in texts], "near", 0.5)[1] == []


def test_a_copy_of_a_held_out_row_leaves_train():
    base = prose(3)
    near = " ".join([*base[:-1], "another"])
    rows = [
        row("same", split="train", place="1"),
        row("same", split="test", place="2"),
        row("shared", split="dev", place="3"),
        row("shared", split="test", place="4"),
        row(near, split="train", place="5"),
        row(" ".join(base), split="dev", place="6"),
        row("own", split="train", place="7"),
    ]
    kept, dropped = deduplicate(rows, "near", 0.9)
    assert [r.place for r in kept] == ["2", "4", "6", "7"]
    assert reasons(dropped) == [("leak", "1"), ("leak", "3"), ("leak", "5")]


def test_contradicting_labels():
    rows = [row("x", "a", place="1"), row("x", "b", place="2")]
    assert reasons(deduplicate(rows, "exact", 0.9)[1]) == [("conflict", "1"), ("conflict", "2")]
    rows = [row("x", "a", place="1"), row("x", "b", place="2"), row("X", "a", place="3")]
    kept, dropped = deduplicate(rows, "exact", 0.9)
    assert kept[0].labels == ("a",)
    assert [reason for reason, _ in reasons(dropped)] == ["conflict", "duplicate"]
    assert "other labels at" in next(d.detail for d in dropped if d.reason == "conflict")


def test_the_order_of_several_labels_is_no_contradiction():
    rows = [Row("x", ("a", "b"), "1"), Row("x", ("b", "a"), "2")]
    assert reasons(deduplicate(rows, "exact", 0.9)[1]) == [("duplicate", "2")]


def test_entities_of_the_same_text_that_differ_are_a_contradiction():
    rows = [Row("Ada ran", ("P",), "1", spans=[Span(0, 3, "P")]), Row("Ada ran", (), "2")]
    assert reasons(deduplicate(rows, "exact", 0.9)[1]) == [("conflict", "1"), ("conflict", "2")]


def test_another_negative_makes_another_row():
    first, second = (Row("red", None, f"f:{i}", pair="rot", negative=said) for i, said in enumerate(("blau", "grün")))
    again = Row("Red", None, "f:2", pair="rot", negative="Blau")
    kept, dropped = deduplicate([first, second, again], "exact", 0.9)
    assert sorted(row.negative.casefold() for row in kept) == ["blau", "grün"]
    assert [one.reason for one in dropped] == [Drop.DUPLICATE]


def test_none_keeps_everything():
    rows = [row("x"), row("x"), row("x", "b")]
    assert deduplicate(rows, "none", 0.9) == (rows, [])


ROWS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 3), st.sampled_from("ab"), st.sampled_from(["train", "dev", "test"])),
    max_size=25,
)


def made(cases):
    rows = []
    for number, (seed, edits, label, split) in enumerate(cases):
        text = prose(seed, 60)
        for i in range(edits):
            text[i * 7] = f"edit{number}"
        rows.append(row(" ".join(text), label, split, str(number)))
    return rows


@given(ROWS, st.sampled_from(["near", "exact"]))
def test_deduplicating_twice_drops_nothing_more(cases, how):
    kept, dropped = deduplicate(made(cases), how, 0.8)
    again, none = deduplicate(kept, how, 0.8)
    assert again == kept
    assert none == []
    assert len(kept) + len(dropped) == len(cases)


@given(ROWS, st.randoms(use_true_random=False))
def test_what_is_kept_does_not_depend_on_the_order(cases, rng):
    rows = made(cases)
    kept = {(r.text, r.labels, r.split) for r in deduplicate(rows, "near", 0.8)[0]}
    rng.shuffle(rows)
    assert {(r.text, r.labels, r.split) for r in deduplicate(rows, "near", 0.8)[0]} == kept


@given(ROWS)
def test_no_two_kept_rows_are_copies(cases):
    kept = [r.text for r in deduplicate(made(cases), "near", 0.8)[0]]
    assert all(true_jaccard(a, b) < 0.8 for i, a in enumerate(kept) for b in kept[:i])
