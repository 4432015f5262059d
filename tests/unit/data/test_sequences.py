"""Interactions and sequences become histories with the last items held out; what is no history is said or dropped."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from llmo.errors import DataError, SpecError
from llmo.specs import TaskSpec
from unit.data.conftest import Import

LINES = [
    *((1, "a", 3), (1, "b", 1), (1, "c", 2), (1, "d", 9), (1, "a", 7)),
    *((2, "b", 1), (2, "c", 2), (2, "d", 3)),
    *((3, "d", 5), (4, "c", 1), (4, "b", 1), (4, "a", 0), (4, "x", 8)),
]


def csv(path: Path, lines: list[tuple[int, str, int]], header: str = "user_id,item_id,timestamp") -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, line)) for line in lines)]) + "\n")
    return path


def test_the_last_items_of_a_user_are_held_out_in_the_order_of_time(tmp_path: Path, import_: Import) -> None:
    got = import_(csv(tmp_path / "x.csv", LINES), "next-item")
    found = {
        name: [(r["id"], r["text"], r["label"]) for r in got.data.split(name)] for name in ("train", "dev", "test")
    }
    assert found["train"] == [("1", "b c a", None), ("2", "b c d", None), ("4", "a c", None)]
    assert found["dev"] == [("1:dev", "b c a", "a"), ("4:dev", "a c", "b")]
    assert found["test"] == [("1:test", "b c a a", "d"), ("4:test", "a c b", "x")]
    assert got.info["rows"] == {"read": 13, "train": 3, "dev": 2, "test": 2, "dropped": 1}
    assert (got.info["users"], got.info["items"], got.info["interactions"]) == (3, 4, 13)
    assert got.info["repeats"] is True  # user 1 met `a` again
    assert got.dropped() == {"one_interaction": ["x.csv:10"]}


def test_what_cannot_be_found_or_measured_is_told(tmp_path: Path, import_: Import) -> None:
    notes = " ".join(import_(csv(tmp_path / "x.csv", LINES), "next-item").notes)
    assert "1 items to be found in test and 0 in dev are in no training row" in notes
    assert "1 users were dropped because they have one interaction" in notes
    assert "1 users have fewer than 4 interactions" in notes


def test_the_order_of_rows_and_users_makes_no_difference(tmp_path: Path, import_: Import) -> None:
    lines = [line for line in LINES if line[0] != 4]  # of the same time, the order of the rows is all there is
    one = import_(csv(tmp_path / "one.csv", lines), "next-item").rows()
    random.Random(3).shuffle(lines)
    assert import_(csv(tmp_path / "two.csv", lines), "next-item").rows() == one


def test_the_same_interaction_counts_once_unless_it_is_told_otherwise(tmp_path: Path, import_: Import) -> None:
    path = csv(tmp_path / "x.csv", [*LINES, LINES[1], LINES[1]])
    assert import_(path, "next-item").info["dropped"] == {"duplicate": 2, "one_interaction": 1}
    assert import_(path, "next-item", clean={"drop_duplicates": "none"}).info["interactions"] == 15


def test_files_of_recbole_and_other_names_are_read(tmp_path: Path, import_: Import) -> None:
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    (tmp_path / "x.inter").write_text(text + "".join(f"{u}\t{i}\t5\t{t}\n" for u, i, t in LINES))
    one = import_(tmp_path / "x.inter", "next-item")
    assert one.info["columns"] == {"user": "user_id", "item": "item_id", "time": "timestamp"}
    two = import_(csv(tmp_path / "y.csv", LINES, "who,what,at"), "next-item", user="who", item="what", time="at")
    assert one.rows() == two.rows()


def test_dates_are_times(tmp_path: Path, import_: Import) -> None:
    rows = [{"user": "u", "item": f"i{n}", "date": f"2026-01-{20 - n:02} 10:00:00"} for n in range(5)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert import_(tmp_path / "x.jsonl", "next-item").rows()[0]["text"] == "i4 i3 i2"


@pytest.mark.parametrize("sequence", [["a", "b", "c", "d"], "a b c d", "a, b,c,d"])
def test_sequences_are_taken_as_they_are(tmp_path: Path, import_: Import, sequence: list[str] | str) -> None:
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"history": sequence}) for _ in range(2)))
    got = import_(tmp_path / "x.jsonl", "next-item")
    assert [(row["text"], row["label"]) for row in got.rows()] == [("a b", None)] * 2 + [("a b", "c")] * 2 + [
        ("a b c", "d")
    ] * 2
    assert "no column tells the time" in " ".join(got.notes)


def test_white_space_in_an_item_does_not_divide_it(tmp_path: Path, import_: Import) -> None:
    lines = [(1, "toy  story", 1), (1, "heat", 2), (1, "toy story", 3)]
    got = import_(csv(tmp_path / "x.csv", lines), "next-item")
    assert got.rows()[0]["text"] == "toy_story heat toy_story"
    assert got.info["changed"] == {"items_with_spaces": 2}


def test_rows_without_a_user_or_an_item_are_dropped(tmp_path: Path, import_: Import) -> None:
    path = tmp_path / "x.csv"
    path.write_text("user,item,time\nu,a,1\n,b,2\nu,,3\nu,c,4\n")
    assert import_(path, "next-item").dropped() == {"incomplete": ["x.csv:3", "x.csv:4"]}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("user,item,time\nu,a,soon\nu,b,2\n", "'soon' is no time"),
        ("user,item,time\nu,a,nan\nu,b,2\n", "'nan' is no time"),
        ("user,item,time\nu,a,\nu,b,2\n", "'' is no time"),
        ("user,word\nu,a\n", "no column is called like an item column"),
        ("item,word\nu,a\n", "no column is called like a user column"),
        ("user,item\nu,a\nv,b\n", "no user has two interactions"),
        ("user,item\nu,a\nu,a\n", "there is one item only"),
        ("user,item\n", "there are no rows"),
    ],
)
def test_what_nothing_can_be_learnt_from(tmp_path: Path, import_: Import, text: str, says: str) -> None:
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=says):
        import_(tmp_path / "x.csv", "next-item")


@pytest.mark.parametrize(
    ("task", "key"), [("next-item", "label"), ("text-classification", "user"), ("regression", "pair")]
)
def test_a_column_that_would_not_be_looked_at_is_refused(tmp_path: Path, import_: Import, task: str, key: str) -> None:
    with pytest.raises(SpecError, match=f"data.{key} says nothing to {task}"):
        import_(csv(tmp_path / "x.csv", LINES), task, **{key: "item_id"})


def test_repeats_are_of_this_task_alone() -> None:
    assert TaskSpec(name="next-item", repeats=True).repeats
    with pytest.raises(ValueError, match="it is of task next-item"):
        TaskSpec(name="generation", repeats=True)


def test_a_column_that_is_not_there(tmp_path: Path, import_: Import) -> None:
    with pytest.raises(DataError, match="no column 'usr'"):
        import_(csv(tmp_path / "x.csv", LINES), "next-item", user="usr")
