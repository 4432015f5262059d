"""Splits are disjoint and complete, follow the seed and not the order, and keep every class where it is needed."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmo.data.row import Row
from llmo.data.split import divide

SHARES = {"test": 0.2, "dev": 0.1}


def rows_of(counts: dict[str, int]) -> list[Row]:
    return [Row(f"text {label} {i}", (label,), f"{label}{i}") for label, n in counts.items() for i in range(n)]


def per_label(rows, chosen) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = {}
    for row, split in zip(rows, chosen, strict=True):
        for label in row.labels:
            found.setdefault(label, Counter())[split] += 1
    return found


def test_each_label_has_its_share():
    rows = rows_of({"a": 1000, "b": 500, "c": 100})
    found = per_label(rows, divide(rows, SHARES, 13))
    assert {label: (n["test"], n["dev"]) for label, n in found.items()} == {
        "a": (200, 100),
        "b": (100, 50),
        "c": (20, 10),
    }


COUNTS = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 40), min_size=2)
SHARE = st.sampled_from([0.0, 0.1, 0.2, 0.34, 0.45])


@given(COUNTS, SHARE, SHARE, st.integers(0, 3), st.randoms(use_true_random=False))
def test_single_labels(counts, test, dev, seed, rng):
    rows = rows_of(counts)
    chosen = divide(rows, {"test": test, "dev": dev}, seed)
    assert set(chosen) <= {"train", "dev", "test"}
    assert len(chosen) == len(rows)
    found = per_label(rows, chosen)
    for label, n in counts.items():
        assert found[label]["train"] >= 1, "no label is missing from train"
        assert abs(found[label]["test"] - n * test) <= 1
        assert found[label]["dev"] <= n * dev + 1
    total = Counter(chosen)
    if min(counts.values()) >= 10:  # smaller labels may have no row to spare
        assert abs(total["test"] - len(rows) * test) <= 1
        assert abs(total["dev"] - len(rows) * dev) <= 1

    order = list(range(len(rows)))
    rng.shuffle(order)
    shuffled = divide([rows[i] for i in order], {"test": test, "dev": dev}, seed)
    assert shuffled == [chosen[i] for i in order], "the order of the rows does not matter"


def test_the_seed_matters():
    rows = rows_of({"a": 50, "b": 50})
    assert divide(rows, SHARES, 1) != divide(rows, SHARES, 2)


@pytest.mark.parametrize("n", range(2, 12))
def test_small_sets_have_a_test_row_and_keep_train(n):
    rows = rows_of({"a": n, "b": n})
    total = Counter(divide(rows, SHARES, 13))
    assert total["test"] >= 1
    assert total["train"] >= 2


LABELS = st.lists(st.sets(st.sampled_from("abcde"), max_size=3), min_size=12, max_size=60)


@given(LABELS, st.integers(0, 3), st.randoms(use_true_random=False))
def test_several_labels(sets, seed, rng):
    rows = [Row(f"text {i}", tuple(sorted(labels)), str(i)) for i, labels in enumerate(sets)]
    chosen = divide(rows, SHARES, seed)
    found = per_label(rows, chosen)
    assert all(splits["train"] >= 1 for splits in found.values()), "no label is missing from train"
    total = Counter(chosen)
    assert total["test"] >= 1
    assert total["train"] >= len(rows) / 2
    order = list(range(len(rows)))
    rng.shuffle(order)
    assert divide([rows[i] for i in order], SHARES, seed) == [chosen[i] for i in order]


def test_several_labels_in_proportion():
    rows = [Row(f"text {i}", ("a", "b") if i % 3 else ("c",) if i % 2 else (), str(i)) for i in range(600)]
    found = per_label(rows, divide(rows, SHARES, 13))
    for label, n in found.items():
        assert abs(n["test"] - 0.2 * n.total()) <= 3, label
        assert abs(n["dev"] - 0.1 * n.total()) <= 3, label


def test_documents_and_equal_texts_are_not_divided():
    rows = [Row(f"sentence {i}", ("P",) if i % 2 else (), str(i), group=f"doc {i // 5}") for i in range(200)]
    chosen = divide(rows, SHARES, 13)
    by_document = {row.group: {s for r, s in zip(rows, chosen, strict=True) if r.group == row.group} for row in rows}
    assert all(len(splits) == 1 for splits in by_document.values())
    assert set(chosen) == {"train", "dev", "test"}

    rows = [Row("the same" if i < 30 else f"text {i}", ("a",), str(i)) for i in range(100)]
    assert len(set(divide(rows, SHARES, 13)[:30])) == 1


def test_a_few_documents_are_divided():
    rows = [Row(f"sentence {i}", ("P",), str(i), group="doc 1") for i in range(50)]
    assert Counter(divide(rows, SHARES, 13)) == {"train": 35, "test": 10, "dev": 5}
