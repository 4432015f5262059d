"""A pairwise judge: what it is told, and what its verdicts amount to."""

from __future__ import annotations

import re

import pytest

from llmo.tasks.pairwise import POINTS, VERDICT, consistent, measure, points, request


@pytest.mark.parametrize(
    ("verdicts", "earned", "alike"),
    [
        (("A", "B"), 1.0, True),
        (("B", "A"), 0.0, True),
        (("tie", "tie"), 0.5, True),
        (("A", "A"), 0.5, False),  # by place
        (("B", "B"), 0.5, False),
        (("A", "tie"), 0.75, False),
        (("tie", "A"), 0.25, False),
    ],
)
def test_both_orders_count(verdicts: tuple[str, str], earned: float, alike: bool) -> None:
    assert (points(verdicts), consistent(verdicts)) == (earned, alike)


def test_the_figures() -> None:
    found = measure([("A", "B")] * 6 + [("B", "A")] * 2 + [("A", "A")] * 2)
    assert (found["wins"], found["losses"], found["ties"]) == (6, 2, 2)
    assert (found["win_rate"]["value"], found["consistency"]["value"]) == (0.7, 0.8)
    assert found["win_rate"]["low"] < 0.7 < found["win_rate"]["high"]
    always = measure([("A", "A")] * 9)
    assert (always["win_rate"]["value"], always["consistency"]["value"], always["ties"]) == (0.5, 0.0, 9)


def test_a_judge_that_chooses_by_place_moves_nothing() -> None:
    assert measure([("A", "A"), ("B", "B")])["win_rate"]["value"] == 0.5


def test_what_the_judge_is_told() -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Size?"}]
    system, user = request(asked, "twelve", "ten", reference="12 cm", criterion="the unit")
    assert (system["role"], user["role"]) == ("system", "user")
    told = user["content"]
    places = [told.index(part) for part in ("system: Be brief.", "user: Size?", "12 cm", "twelve", "ten\n", "the unit")]
    assert places == sorted(places)
    bare = request(asked, "twelve", "ten")[1]["content"]
    assert "comparison" not in bare
    assert "counts" not in bare
    assert [word for word in ("A", "B", "tie", "C", "Atie") if re.fullmatch(VERDICT, word)] == list(POINTS)
