"""The report of a training and of an evaluation: what is in it, that it is true, and that it harms nobody."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmo.context import NullContext
from llmo.data.dataset import Dataset
from llmo.errors import SpecError
from llmo.training import evaluate, page, pictures, report
from llmo.training.findings import WORST
from support.tiny import tiny_dataset

Train = Callable[..., dict[str, Any]]
PNG = b"\x89PNG\r\n"


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / report.FILE).read_text(encoding="utf-8"))


def evaluated(out: Path, **inputs: Path) -> dict[str, Any]:
    out.mkdir()
    return evaluate.run({"split": "test"}, inputs, out, NullContext(1))


@pytest.fixture
def trained(train: Train, texts: Path, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    return train(texts, epochs=3, learning_rate=5e-3), tmp_path / "out" / report.FOLDER


def test_a_training_leaves_a_report(trained: tuple[dict[str, Any], Path], texts: Path) -> None:
    result, folder = trained
    found = read(folder)
    assert found["metrics"] == result["test"]["after"]
    assert found["before"] == result["test"]["before"]
    assert (found["split"], found["rows"], found["task"]) == ("test", 32, "text-classification")
    classes = {c["name"]: c for c in found["per_class"]}
    assert set(classes) == {"business", "sport", "tech"}
    assert sum(c["gold"] for c in classes.values()) == sum(c["answered"] for c in classes.values()) == 32
    for name, c in classes.items():
        assert c["f1"] == found["metrics"][f"f1/{name}"]
        if c["precision"] and c["recall"]:
            mean = 2 * c["precision"] * c["recall"] / (c["precision"] + c["recall"])
            assert c["f1"]["value"] == pytest.approx(mean)
    assert found["calibration"] == result["calibration"]
    assert found["calibration"]["decisions"] == 32
    right = sum(b["accuracy"] * b["count"] for b in found["calibration"]["bins"])
    assert right / 32 == pytest.approx(result["test"]["after"]["accuracy"]["value"])
    assert found["memory"]["peak_bytes"] == result["memory"]["peak_bytes"] > 100 << 20
    assert found["speed"]["samples_per_second"] > 0


def test_the_worst_errors_are_rows_that_can_be_found(trained: tuple[dict[str, Any], Path], texts: Path) -> None:
    rows = {row["id"]: row for row in Dataset.open(texts).split("test")}
    worst = read(trained[1])["worst"]
    assert len(worst) == min(WORST, len(rows))
    losses = [row["loss"] for row in worst]
    assert losses == sorted(losses, reverse=True)
    for row in worst:
        assert (rows[row["id"]]["text"], rows[row["id"]]["label"]) == (row["text"], row["gold"])
    wrong = 32 - round(32 * trained[0]["test"]["after"]["accuracy"]["value"])
    assert sum(row["answer"] != row["gold"] for row in worst) == min(wrong, WORST)


def test_pictures_and_a_page_that_needs_nothing_else(trained: tuple[dict[str, Any], Path]) -> None:
    _, folder = trained
    assert read(folder)["pictures"] == ["confusion.png", "reliability.png"]
    for name in read(folder)["pictures"]:
        assert (folder / name).read_bytes().startswith(PNG)
    text = (folder / report.PAGE).read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "<script" not in text


def test_evaluation_says_what_training_said(trained: tuple[dict[str, Any], Path], texts: Path, tmp_path: Path) -> None:
    evaluated(tmp_path / "again", data=texts, model=tmp_path / "out")
    ours, theirs = read(tmp_path / "again"), read(trained[1])
    for name in ("metrics", "per_class", "details", "pictures"):
        assert ours[name] == theirs[name]
    assert ours["calibration"]["ece"] == pytest.approx(theirs["calibration"]["ece"], abs=1e-4)
    assert [row["id"] for row in ours["worst"]] == [row["id"] for row in theirs["worst"]]


def test_against_another_model(train: Train, texts: Path, tmp_path: Path) -> None:
    train(texts, "good", epochs=12, learning_rate=5e-3)
    train(texts, "bad", epochs=0.2, learning_rate=1e-6)
    good, bad = tmp_path / "good", tmp_path / "bad"
    found = evaluated(tmp_path / "r", data=texts, model=good, against=bad)
    difference = found["against"]["difference"]["accuracy"]
    both = found["metrics"]["accuracy"]["value"], found["against"]["metrics"]["accuracy"]["value"]
    assert difference["value"] == pytest.approx(both[0] - both[1])
    assert 0 < difference["low"] < difference["value"] < difference["high"]
    itself = evaluated(tmp_path / "s", data=texts, model=good, against=good)["against"]["difference"]["accuracy"]
    assert itself == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_models_of_two_tasks_are_not_compared(train: Train, texts: Path, spans: Path, tmp_path: Path) -> None:
    train(texts, "texts", epochs=0.2)
    train(spans, "spans", task="token-classification", epochs=0.2)
    with pytest.raises(SpecError, match="cannot be compared"):
        evaluated(tmp_path / "r", data=texts, model=tmp_path / "texts", against=tmp_path / "spans")


def test_spans_and_generation_get_what_fits_them(
    train: Train, spans: Path, chats: Path, talker: Path, tmp_path: Path
) -> None:
    train(spans, "spans", task="token-classification", epochs=1)
    found = read(tmp_path / "spans" / report.FOLDER)
    assert {c["name"] for c in found["per_class"]} == {"person", "place"}
    assert found["calibration"]["decisions"] > found["rows"]
    assert found["pictures"] == ["reliability.png"]
    train(chats, "chats", task="generation", model=talker, max_length=128, epochs=0.5)
    said = read(tmp_path / "chats" / report.FOLDER)
    assert said["calibration"] is None
    assert said["per_class"] == said["pictures"] == []
    assert said["worst"][0]["gold"].startswith("It is ")
    assert said["worst"][0]["loss"] >= said["metrics"]["loss"]["value"]


def test_nothing_held_out_leaves_no_report(train: Train, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "d", sizes={"train": 32, "dev": 0, "test": 0})
    assert train(data, epochs=0.2)["calibration"] is None
    assert not (tmp_path / "out" / report.FOLDER).exists()


def test_without_matplotlib_it_is_said_before(
    train: Train, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(pictures, "find_spec", lambda name: None)
    monkeypatch.setattr(NullContext, "note", lambda self, message: notes.append(message))
    train(texts, epochs=0.2)
    assert pictures.MISSING in notes
    assert read(tmp_path / "out" / report.FOLDER)["pictures"] == []


def drawn(labels: list[str], **more: Any) -> dict[str, Any]:
    confusion = np.eye(len(labels), dtype=int).tolist()
    base = {"task": "t", "split": "test", "rows": 3, "metrics": {}, "per_class": [], "worst": [], "calibration": None}
    return base | {"details": {"labels": labels, "confusion": confusion}} | more


@pytest.mark.parametrize(
    "labels",
    [["好评", "差评"], ["a$b$c", "$x"], ["", "\n"], [f"label number {i} of many" for i in range(60)], ["one"]],
    ids=["chinese", "dollars", "blank", "many", "one"],
)
def test_any_label_can_be_drawn(labels: list[str]) -> None:
    assert pictures.draw(drawn(labels))["confusion.png"].startswith(PNG)


def test_texts_of_the_data_are_no_html() -> None:
    evil = "<script>alert(1)</script>"
    row = {"id": evil, "loss": 1.0, "score": None, "gold": evil, "answer": evil, "text": evil}
    text = page.render(evil, drawn([evil, "b"], worst=[row]), {"confusion.png": b""})
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 6
