"""What is written is read again: memory-mapped, by index, slice and column, and damage is told."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from llmo.data.dataset import Dataset, write
from llmo.data.row import Drop, Dropped, Row, Span
from llmo.data.stored import LABELS, ONE_LABEL, SPANS
from llmo.errors import DataError, NotFoundError


@pytest.fixture
def rows():
    return [Row(f"text {i} 😀", (f"l{i % 3}",), f"a.csv:{i}", id=str(i), split="train") for i in range(2500)]


@pytest.fixture
def folder(tmp_path, rows):
    lost = [Dropped(Row("x", None, "a.csv:9", id="9"), Drop.EMPTY, "why")]
    splits = {"train": rows, "dev": rows[:3], "test": []}
    write(tmp_path, splits, lost, {"task": "text-classification"}, ONE_LABEL)
    return tmp_path


def test_rows_are_a_sequence(folder, rows):
    train = Dataset.open(folder).split("train")
    assert len(train) == 2500
    assert train[0] == {"id": "0", "text": "text 0 😀", "label": "l0"}
    assert train[-1] == train[2499] == {"id": "2499", "text": "text 2499 😀", "label": "l0"}
    assert [row["id"] for row in train] == [row.id for row in rows]
    assert [row["id"] for row in train[1022:1027]] == ["1022", "1023", "1024", "1025", "1026"]
    assert train[1022:1027][2]["id"] == "1024"
    assert [row["id"] for row in train[10:0:-4]] == ["10", "6", "2"]
    assert train.column("label")[:4] == ["l0", "l1", "l2", "l0"]
    assert list(train[5:5]) == []
    for wrong in (2500, -2501):
        with pytest.raises(IndexError):
            train[wrong]


def test_an_empty_split_and_what_was_dropped(folder):
    data = Dataset.open(folder)
    assert len(data.split("test")) == 0
    assert list(data.split("test")) == []
    assert data.split("test").column("text") == []
    (row,) = data.dropped()
    assert row == {"id": "9", "text": "x", "reason": "empty", "detail": "why", "source": "a.csv:9"}


def test_rows_are_mapped_and_not_read(folder):
    before = pa.total_allocated_bytes()
    train = Dataset.open(folder).split("train")
    assert train[2000]["id"] == "2000"
    assert pa.total_allocated_bytes() - before < (folder / "train.arrow").stat().st_size // 4


def test_spans_and_several_labels(tmp_path):
    row = Row("Ada ran", ("P",), "1", id="1", spans=[Span(0, 3, "P")])
    splits = {"train": [row], "dev": [], "test": []}
    (tmp_path / "s").mkdir()
    write(tmp_path / "s", splits, [], {}, SPANS)
    assert Dataset.open(tmp_path / "s").split("train")[0]["spans"] == [{"start": 0, "end": 3, "label": "P"}]
    (tmp_path / "m").mkdir()
    write(tmp_path / "m", splits, [], {}, LABELS)
    assert Dataset.open(tmp_path / "m").split("train")[0]["labels"] == ["P"]


def test_what_is_asked_for_wrongly(folder):
    with pytest.raises(NotFoundError, match="not a data set"):
        Dataset.open(folder / "nowhere")
    with pytest.raises(NotFoundError, match="no split 'valid'"):
        Dataset.open(folder).split("valid")
    with pytest.raises(DataError, match="no column 'labels'"):
        Dataset.open(folder).split("train").column("labels")


def test_damage_is_told(folder):
    (folder / "train.arrow").write_bytes((folder / "train.arrow").read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read"):
        Dataset.open(folder).split("train")
    (folder / "dev.arrow").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        Dataset.open(folder).split("dev")
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        Dataset.open(folder)
    (folder / "dataset.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(DataError, match="format this version does not know"):
        Dataset.open(folder)
