"""Every format, encoding and layout is read into the same rows."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmo import plugins

PAIRS = [("good day", "pos"), ("bad day", "neg"), ("fine, really", "pos"), ('awful "food"', "neg")]


def labelled(got) -> set[tuple[str, str]]:
    return {(row["text"], row["label"]) for row in got.rows()}


def quoted(cells, sign):
    return sign.join('"' + cell.replace('"', '""') + '"' for cell in cells)


def test_every_format_has_a_reader():
    known = ["chatterbot", "conll", "csv", "folders", "inter", "json", "jsonl", "parquet", "text", "tsv"]
    assert plugins.names("llmo.readers") == known


@pytest.mark.parametrize("sign", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_delimited(tmp_path, import_, sign, end):
    path = tmp_path / "a.csv"
    lines = [sign.join(["text", "label"]), *(quoted(pair, sign) for pair in PAIRS)]
    path.write_bytes(end.join(lines).encode())
    assert labelled(import_(path)) == set(PAIRS)


def test_tsv_with_quotes_that_quote_nothing(tmp_path, import_):
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"Hello" he said\ta\n"unclosed\tb\nplain\ta\n')
    got = import_(path)
    assert ('"unclosed', "b") in labelled(got)
    assert any("quotes are read as characters" in note for note in got.notes)


def test_cells_may_hold_line_ends(tmp_path, import_):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"one\n\n two",a\nthree,b\n')
    assert ("one\ntwo", "a") in labelled(import_(path))


@pytest.mark.parametrize(
    "document",
    [
        [{"text": t, "label": y} for t, y in PAIRS],
        {"data": [{"text": t, "label": y} for t, y in PAIRS]},
        {"text": [t for t, _ in PAIRS], "label": [y for _, y in PAIRS]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_json(tmp_path, import_, document, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document, indent=indent))
    assert labelled(import_(path)) == set(PAIRS)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.txt"])
def test_json_lines_whatever_they_are_called(tmp_path, import_, name):
    path = tmp_path / name
    path.write_text("\n".join(json.dumps({"text": t, "label": y}) for t, y in PAIRS))
    assert labelled(import_(path)) == set(PAIRS)


def test_parquet(tmp_path, import_):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [t for t, _ in PAIRS], "label": [y for _, y in PAIRS]}), path)
    assert labelled(import_(path)) == set(PAIRS)


def test_parquet_class_names(tmp_path, import_):
    features = {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}, "text": {"dtype": "string"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"text": ["a", "b", "c"], "label": [0, 1, -1]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "a.parquet")
    got = import_(tmp_path / "a.parquet")
    assert labelled(got) == {("a", "neg"), ("b", "pos")}
    assert got.info["dropped"] == {"no_label": 1}


def test_parquet_tag_names(tmp_path, import_):
    inner = {"names": ["O", "B-PER", "I-PER"], "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": {"ner_tags": {"feature": inner}}}})}
    table = pa.table({"tokens": [["Ada", "Lovelace", "ran"]], "ner_tags": [[1, 2, 0]]})
    pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    (row,) = import_(tmp_path / "a.parquet", task="token-classification").rows()
    assert row["spans"] == [{"start": 0, "end": 12, "label": "PER"}]


def test_folders_by_label(tmp_path, import_):
    for label, name, text in [("b", "1.txt", "x"), ("a", "2.txt", "y"), ("a", "sub/3.txt", "z"), ("a", "4.png", "no")]:
        path = tmp_path / "d" / label / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "secret.txt").write_text("not part of it")
    (tmp_path / "d" / "a" / "link.txt").symlink_to(tmp_path / "secret.txt")
    got = import_(tmp_path / "d")
    assert labelled(got) == {("x", "b"), ("y", "a"), ("z", "a")}
    assert any("2 files were left out" in note for note in got.notes)


@pytest.mark.parametrize("names", [("train", "dev", "test"), ("training", "validation", "Test")])
def test_splits_by_folder(tmp_path, import_, names):
    for number, split in enumerate(names):
        for label in ("a", "b"):
            path = tmp_path / "d" / split / label / "1.txt"
            path.parent.mkdir(parents=True)
            path.write_text(f"{label} text {number}")
    got = import_(tmp_path / "d")
    assert got.info["splits"] == "fixed"
    assert sorted(got.texts("dev")) == ["a text 1", "b text 1"]
    assert sorted(got.texts("test")) == ["a text 2", "b text 2"]


def test_splits_by_file(tmp_path, import_):
    for name, text in [("news_train-00000-of-00002", "one"), ("news_train-00001-of-00002", "two"), ("news_test", "3")]:
        (tmp_path / f"{name}.csv").write_text(f"text,label\n{text} a,a\n{text} b,b\n")
    (tmp_path / "README.txt").write_text("about this data")
    got = import_(tmp_path, split={"dev": 0.0})
    assert got.info["rows"] == {"read": 6, "train": 4, "dev": 0, "test": 2, "dropped": 0}


def test_splits_by_column_and_dev_taken_from_train(tmp_path, import_):
    rows = [f"text {i} {y},{y},{'test' if i >= 40 else 'train'}" for i in range(50) for y in "ab"]
    (tmp_path / "a.csv").write_text("text,label,split\n" + "\n".join(rows))
    got = import_(tmp_path / "a.csv", split={"dev": 0.1})
    assert got.info["rows"] == {"read": 100, "train": 72, "dev": 8, "test": 20, "dropped": 0}
    assert got.notes == ["the source has no dev: taken from its train rows"]


def test_splits_in_a_json_object(tmp_path, import_):
    rows = {"train": [{"text": "a", "label": 1}, {"text": "b", "label": 2}], "val": [{"text": "c", "label": 1}]}
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert import_(tmp_path / "a.json", split={"test": 0.0}).texts("dev") == ["c"]


def test_files_of_one_format_are_one_source(tmp_path, import_):
    (tmp_path / "jan.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "feb.csv").write_text("text,label\nc,x\nd,y\n")
    assert sorted(import_(tmp_path).texts()) == ["a", "b", "c", "d"]


def test_columns_by_name_in_other_languages(tmp_path, import_):
    (tmp_path / "a.csv").write_text("编号,文本,标签\n1,很好,正面\n2,很差,负面\n")
    got = import_(tmp_path / "a.csv")
    assert got.info["columns"] == {"text": "文本", "label": "标签", "id": "编号"}
    assert {row["id"] for row in got.rows()} == {"1", "2"}


def test_told_columns_win(tmp_path, import_):
    (tmp_path / "a.csv").write_text("text,label,gist,kind\nx,y,short a,one\nx,y,short b,two\n")
    got = import_(tmp_path / "a.csv", text="gist", label="kind")
    assert labelled(got) == {("short a", "one"), ("short b", "two")}


@pytest.mark.parametrize(("value", "name"), [(1, "1"), (2.0, "2"), (2.5, "2.5"), (True, "true"), (" a  b ", "a b")])
def test_labels_are_strings(tmp_path, import_, value, name):
    rows = [{"text": "a", "label": value}, {"text": "b", "label": "other"}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert ("a", name) in labelled(import_(tmp_path / "a.json"))


def test_labels_divided_by_a_separator(tmp_path, import_):
    (tmp_path / "a.csv").write_text("text,label\na,x|y\nb,y\nc,\nd,x| |x\n")
    got = import_(tmp_path / "a.csv", label_separator="|")
    assert got.info["multi_label"] is True
    assert {row["text"]: row["labels"] for row in got.rows()} == {"a": ["x", "y"], "b": ["y"], "d": ["x"]}


def test_lists_of_labels_and_none_that_fits(tmp_path, import_):
    rows = [{"text": "a", "labels": ["x", "y"]}, {"text": "b", "labels": []}, {"text": "c", "labels": ["y"]}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    got = import_(tmp_path / "a.json")
    assert {row["text"]: row["labels"] for row in got.rows()} == {"a": ["x", "y"], "b": [], "c": ["y"]}


def test_lists_of_one_label_are_single(tmp_path, import_):
    rows = [{"text": "a", "labels": ["x"]}, {"text": "b", "labels": ["y"]}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert import_(tmp_path / "a.json").info["multi_label"] is False
    assert import_(tmp_path / "a.json", multi_label=True).info["multi_label"] is True


def test_conll_columns_comments_documents_and_schemes(tmp_path, import_):
    (tmp_path / "a.txt").write_text(
        "-DOCSTART- -X- O O\n\n# sent_id = 1\nAda NNP x B-PER\nLovelace NNP x E-PER\nruns VB x O\n\n"
        "Bob NNP x S-PER\n#tag NN x O\nIn IN x I-LOC\nRome NNP x I-LOC\n"
    )
    got = import_(tmp_path / "a.txt", task="token-classification")
    spans = {
        row["text"]: [(row["text"][s["start"] : s["end"]], s["label"]) for s in row["spans"]] for row in got.rows()
    }
    assert spans == {
        "Ada Lovelace runs": [("Ada Lovelace", "PER")],
        "Bob #tag In Rome": [("Bob", "PER"), ("In Rome", "LOC")],
    }
    assert any("1 entities begin with I-" in note for note in got.notes)


def test_conll_puts_no_space_between_chinese_characters(tmp_path, import_):
    lines = ["我 O", "在 O", "北 B-LOC", "京 I-LOC", "用 O", "iPhone B-PROD", "15 I-PROD", "。 O"]
    (tmp_path / "a.conll").write_text("\n".join(lines))
    (row,) = import_(tmp_path / "a.conll", task="token-classification").rows()
    assert row["text"] == "我在北京用 iPhone 15 。"
    assert [row["text"][s["start"] : s["end"]] for s in row["spans"]] == ["北京", "iPhone 15"]


def test_spans_and_entities_in_json(tmp_path, import_):
    rows = [
        {"text": "Ada met Bob 😀 in Rom", "entities": [{"start": 0, "end": 3, "type": "P"}, [8, 11, "P"]]},
        {"text": "no one", "entities": []},
        {"text": "not annotated", "entities": None},
        {"text": "Bank of England", "entities": [[0, 15, "ORG"], [8, 15, "LOC"]]},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    got = import_(tmp_path / "a.jsonl", task="token-classification")
    spans = {row["text"]: [(s["start"], s["end"], s["label"]) for s in row["spans"]] for row in got.rows()}
    assert spans == {
        "Ada met Bob 😀 in Rom": [(0, 3, "P"), (8, 11, "P")],
        "no one": [],
        "Bank of England": [(0, 15, "ORG")],
    }
    assert got.info["dropped"] == {"no_label": 1}
    assert any("1 entities were left out because they overlap" in note for note in got.notes)


def test_yaml_beside_data_or_folders_is_no_data(tmp_path, import_):
    for name, content in (("a.csv", "text,label\none,a\ntwo,b\n"), ("about.yml", "made: by hand\n")):
        (tmp_path / name).write_text(content)
    assert labelled(import_(tmp_path)) == {("one", "a"), ("two", "b")}
    (tmp_path / "a.csv").unlink()
    for label, text in (("a", "one"), ("b", "two")):
        (tmp_path / label).mkdir()
        (tmp_path / label / "1.txt").write_text(text)
    assert labelled(import_(tmp_path)) == {("one", "a"), ("two", "b")}
