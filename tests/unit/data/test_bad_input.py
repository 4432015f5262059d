"""Each thing that can be wrong with data: a DataError that says where, what, and what to do; nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest

from llmo.context import NullContext
from llmo.data.operation import run
from llmo.data.profile import profile
from llmo.errors import DataError, SpecError
from llmo.sources import fingerprint
from llmo.specs import DataSpec, TaskSpec

GOOD = "text,label\ngood day,pos\nbad day,neg\nfine,pos\nawful,neg\n"


def refused(import_, source, **told) -> DataError:
    with pytest.raises(DataError) as caught:
        import_(source, **told)
    assert caught.value.hint, "every data error says what to do"
    assert str(source.parent) not in str(caught.value), "places are relative to the source"
    return caught.value


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_an_empty_file(tmp_path, import_):
    error = refused(import_, write(tmp_path, "a.csv", ""))
    assert "empty" in error.what
    assert error.where == "a.csv"


def test_a_header_without_rows(tmp_path, import_):
    assert "no rows" in refused(import_, write(tmp_path, "a.csv", "text,label\n")).what


def test_only_blank_lines(tmp_path, import_):
    assert "blank" in refused(import_, write(tmp_path, "a.csv", "\n\n  \n")).what


def test_no_rows_after_cleaning(tmp_path, import_):
    error = refused(import_, write(tmp_path, "a.csv", "text,label\n \t,a\n\u200b,b\n"))
    assert "no rows are left after cleaning (2 empty)" in error.what


def test_one_class_only(tmp_path, import_):
    error = refused(import_, write(tmp_path, "a.csv", "text,label\none,a\ntwo,a\nthree,a\n"))
    assert "one class only: 'a'" in error.what


def test_one_column_for_text_and_label(tmp_path, import_):
    error = refused(import_, write(tmp_path, "a.csv", GOOD), text="label", label="label")
    assert "both text and label" in error.what


def test_a_column_that_is_no_label(tmp_path, import_):
    rows = "".join(f"text number {i},reason {i}\n" for i in range(200))
    assert "not a label column" in refused(import_, write(tmp_path, "a.csv", "text,label\n" + rows)).what


def test_a_label_in_test_that_train_lacks(tmp_path, import_):
    write(tmp_path, "d/train.csv", GOOD)
    write(tmp_path, "d/test.csv", "text,label\nodd one,Neutral\n")
    error = refused(import_, tmp_path / "d")
    assert "'Neutral' is in test but not in train" in error.what
    assert error.where == "test.csv:2"


def test_a_label_of_dev_in_another_case_is_pointed_at(tmp_path, import_):
    write(tmp_path, "d/train.csv", GOOD)
    write(tmp_path, "d/dev.csv", "text,label\nodd one,POS\n")
    assert "(there it is 'pos')" in refused(import_, tmp_path / "d").what


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (b"PK\x03\x04", "ZIP"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"%PDF-1.7", "PDF"),
        (b"\x89PNG\r\n", "PNG"),
        (b"text,label\n\x00\x01\x02\x00abc", "NUL"),
        (bytes(range(1, 9)) * 20, "control characters"),
    ],
)
def test_a_binary_file_called_csv(tmp_path, import_, head, says):
    error = refused(import_, write(tmp_path, "a.csv", head + b"\xfe\xfd" * 32))
    assert says in error.what
    assert error.where == "a.csv"


def test_bytes_that_a_told_encoding_forbids(tmp_path, import_):
    path = write(tmp_path, "a.csv", "text,label\nbad \xff byte,a\nok,b\n".encode("latin-1"))
    error = refused(import_, path, encoding="utf-8")
    assert "byte 0xff is not utf-8" in error.what
    assert len(import_(path).texts()) == 2  # detected, it is read


def test_an_unknown_encoding(tmp_path, import_):
    assert "unknown encoding 'utf-88'" in refused(import_, write(tmp_path, "a.csv", GOOD), encoding="utf-88").what


@pytest.mark.parametrize("name", ["long.csv", "long.jsonl", "long.conll"])
def test_a_line_of_100_mb_is_refused_in_bounded_memory(tmp_path, import_, name):
    path = tmp_path / name
    head = {"long.csv": b"text,label\n", "long.jsonl": b'{"text": "', "long.conll": b"a\tO\n"}[name]
    with path.open("wb") as file:
        file.write(head)
        for _ in range(100):
            file.write(b"x" * 1_000_000)
    tracemalloc.start()
    try:
        error = refused(import_, path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "more than 10,000,000 characters" in error.what
    assert error.where == f"{name}:{1 if name == 'long.jsonl' else 2}"
    assert peak < 80_000_000


def test_a_huge_text_file_in_a_folder(tmp_path, import_):
    write(tmp_path, "d/a/1.txt", "x" * 40_000_001)
    write(tmp_path, "d/b/1.txt", "y")
    assert refused(import_, tmp_path / "d").where == "a/1.txt"


def test_a_quote_that_is_never_closed(tmp_path, import_):
    error = refused(import_, write(tmp_path, "a.csv", 'text,label\nfine,a\n"never closed,b\nmore,a\n'))
    assert error.where == "a.csv:3"
    assert "never closed" in error.what


def test_a_quote_inside_a_quoted_cell(tmp_path, import_):
    error = refused(import_, write(tmp_path, "a.csv", 'text,label\nfine,a\n"he said "no" twice",b\n'))
    assert error.where == "a.csv:3"
    assert "broken quoting" in error.what


def test_the_row_of_an_error_counts_lines_inside_quotes(tmp_path, import_):
    error = refused(import_, write(tmp_path, "a.csv", 'text,label\n"two\nlines",a\nx,y,z\n'))
    assert error.where == "a.csv:4"


@pytest.mark.parametrize("row", ["one,a,extra", "only text"])
def test_ragged_rows(tmp_path, import_, row):
    error = refused(import_, write(tmp_path, "a.csv", f"text,label\nfine,a\n{row}\n"))
    assert error.where == "a.csv:3"
    assert "the first row has 2" in error.what


def test_the_same_column_twice(tmp_path, import_):
    assert "two columns are called 'text'" in refused(import_, write(tmp_path, "a.csv", "text,text\na,b\n")).what


def test_rows_without_a_label_are_counted(tmp_path, import_):
    got = import_(write(tmp_path, "a.csv", GOOD + "no label,\nnot a number,NaN\n"))
    assert got.info["dropped"] == {"no_label": 2}
    assert got.dropped() == {"no_label": ["a.csv:6", "a.csv:7"]}
    assert any("2 rows were dropped because they have no label" in note for note in got.notes)


def test_more_than_half_without_a_label(tmp_path, import_):
    error = refused(import_, write(tmp_path, "a.csv", "text,label\none,a\ntwo,\nthree,nan\n"))
    assert "2 of 3 rows have no label; the first is a.csv:3" in error.what


def test_ids_that_are_told_and_repeated(tmp_path, import_):
    path = write(tmp_path, "a.csv", "key,text,label\n7,one,a\n8,two,b\n7,three,a\n")
    error = refused(import_, path, id="key")
    assert "the id '7' is already that of a.csv:2" in error.what
    assert error.where == "a.csv:4"
    got = import_(path)  # found by name only: ids are made instead, and told
    assert len({row["id"] for row in got.rows()}) == 3
    assert any("'key' is not used as id" in note for note in got.notes)


def test_ids_that_are_told_and_missing(tmp_path, import_):
    path = write(tmp_path, "a.csv", "id,text,label\n1,one,a\n,two,b\n")
    assert refused(import_, path, id="id").where == "a.csv:3"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "x", "label": }', "broken JSON"),
        ("[1, 2]", "an object of columns, this is a list"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": ' + '{"a":' * 300 + "1" + "}" * 300 + "}", "nested too deeply"),
        ('{"text": ' + "9" * 5000 + "}", "a number is too long"),
        ('{"text": {"a": 1}, "label": "a"}', "the text is a dict"),
        ('{"text": "x", "label": {"a": 1}}', "a label must be a string"),
    ],
)
def test_broken_json_lines(tmp_path, import_, line, says):
    path = write(tmp_path, "a.jsonl", '{"text": "ok", "label": "a"}\n\n' + line + "\n")
    error = refused(import_, path)
    assert says in error.what
    assert error.where == "a.jsonl:3"


def test_a_broken_json_document_names_the_line(tmp_path, import_):
    error = refused(import_, write(tmp_path, "a.json", '[\n{"text": "x", "label": "a"},\n{"text": }\n]'))
    assert error.where == "a.json:3"


@pytest.mark.parametrize("document", ["3", '{"a": 1}', '"text"'])
def test_a_json_document_without_rows(tmp_path, import_, document):
    refused(import_, write(tmp_path, "a.json", document))


def test_lone_surrogates_become_the_replacement_character(tmp_path, import_):
    lines = ['{"text": "half \\ud83d pair", "label": "a"}', '{"text": "whole \\ud83d\\ude00 pair", "label": "b"}']
    got = import_(write(tmp_path, "a.jsonl", "\n".join(lines)))
    assert sorted(got.texts()) == ["half \ufffd pair", "whole 😀 pair"]
    assert got.info["changed"]["encoding"] == 1


@pytest.mark.parametrize("tag", ["X-PER", "B", "PER", "I-", "b-PER"])
def test_a_wrong_tag_names_its_line(tmp_path, import_, tag):
    path = write(tmp_path, "a.conll", f"Ada\tB-PER\nran\tO\n\nBob\t{tag}\n")
    error = refused(import_, path, task="token-classification")
    assert error.where == "a.conll:4"
    assert f"'{tag}' is not a tag" in error.what


def test_a_conll_line_without_a_tag(tmp_path, import_):
    error = refused(import_, write(tmp_path, "a.conll", "Ada\tB-PER\nran\n"), task="token-classification")
    assert error.where == "a.conll:2"


def test_tagging_without_any_entity(tmp_path, import_):
    error = refused(import_, write(tmp_path, "a.conll", "a\tO\n\nb\tO\n"), task="token-classification")
    assert "no row has a label or an entity" in error.what


@pytest.mark.parametrize(
    ("entity", "says"),
    [
        ({"start": 0, "end": 99, "label": "P"}, "not inside the text"),
        ({"start": 3, "end": 3, "label": "P"}, "not inside the text"),
        ({"start": 0, "label": "P"}, "lacks its start, end or label"),
        ({"start": True, "end": 3, "label": "P"}, "lacks its start, end or label"),
        ({"start": 0, "end": 3, "label": "P", "text": "Bob"}, "should read 'Bob'"),
        ([0, 3], "neither an object nor"),
    ],
)
def test_entities_that_do_not_fit_the_text(tmp_path, import_, entity, says):
    path = write(tmp_path, "a.jsonl", json.dumps({"text": "Ada ran.", "entities": [entity]}))
    error = refused(import_, path, task="token-classification")
    assert says in error.what
    assert error.where == "a.jsonl:1"


def test_tokens_and_tags_of_different_length(tmp_path, import_):
    path = write(tmp_path, "a.jsonl", json.dumps({"tokens": ["a", "b"], "tags": ["O"]}))
    assert "2 tokens and 1 tags" in refused(import_, path, task="token-classification").what


def test_tags_that_are_numbers_without_names(tmp_path, import_):
    path = write(tmp_path, "a.jsonl", json.dumps({"tokens": ["a"], "ner_tags": [3]}))
    assert "3 is a number, not the name of a tag" in refused(import_, path, task="token-classification").what


def test_a_missing_column_names_those_there_and_the_nearest(tmp_path, import_):
    path = write(tmp_path, "a.csv", "labell,txet,other\na,b,c\n")
    error = refused(import_, path, text="text")
    assert "no column 'text'; did you mean 'txet'?" in error.what
    assert "labell, txet, other" in error.hint
    error = refused(import_, path, text="txet")
    assert "did you mean 'labell'?" in error.what
    assert "data.label: NAME" in error.hint


def test_no_column_for_the_label(tmp_path, import_):
    error = refused(import_, write(tmp_path, "a.csv", "text\nhello\n"))
    assert "no column is called like a label" in error.what
    assert "the columns are: text" in error.hint


def test_tagged_words_for_a_task_over_texts(tmp_path, import_):
    assert "token-classification" in refused(import_, write(tmp_path, "a.conll", "Ada\tB-PER\n")).hint


def test_too_few_rows_for_a_split_are_told(tmp_path, import_):
    got = import_(write(tmp_path, "a.csv", "text,label\none,a\ntwo,b\n"))
    assert got.notes == ["there are too few rows for dev: it is empty", "there are too few rows for test: it is empty"]


def test_a_split_column_with_another_word(tmp_path, import_):
    path = write(tmp_path, "a.csv", "text,label,part\na,x,train\nb,y,holdout\n")
    error = refused(import_, path, split_column="part")
    assert "'holdout' is not the name of a split" in error.what
    assert error.where == "a.csv:3"


def test_a_row_that_names_no_split(tmp_path, import_):
    path = write(tmp_path, "a.jsonl", '{"text":"a","label":"x","split":"train"}\n{"text":"b","label":"y"}\n')
    assert refused(import_, path).where == "a.jsonl:2"


def test_several_labels_where_one_is_told(tmp_path, import_):
    path = write(tmp_path, "a.jsonl", '{"text":"a","label":["x","y"]}\n{"text":"b","label":["y"]}\n')
    assert "2 labels" in refused(import_, path, multi_label=False).what


def test_splits_without_train(tmp_path, import_):
    path = write(tmp_path, "a.csv", "text,label,split\na,x,test\nb,y,test\n")
    assert "no train rows" in refused(import_, path).what


def test_shares_that_leave_nothing_to_train_on(tmp_path, import_):
    with pytest.raises(SpecError, match="leave nothing to train on"):
        import_(write(tmp_path, "a.csv", GOOD), split={"test": 0.5, "dev": 0.5})


def test_a_folder_that_mixes_formats(tmp_path, import_):
    write(tmp_path, "d/a.csv", GOOD)
    write(tmp_path, "d/b.jsonl", "{}")
    assert "mixes formats: csv, jsonl" in refused(import_, tmp_path / "d").what


def test_a_folder_without_data(tmp_path, import_):
    write(tmp_path, "d/picture.png", b"x")
    assert "no data file" in refused(import_, tmp_path / "d").what
    (tmp_path / "e" / "label").mkdir(parents=True)
    assert "no text files" in refused(import_, tmp_path / "e").what


def test_a_file_whose_format_cannot_be_told(tmp_path, import_):
    assert "cannot tell the format" in refused(import_, write(tmp_path, "notes.txt", "just some words\n")).what


def test_a_damaged_parquet_file(tmp_path, import_):
    path = write(tmp_path, "a.parquet", b"PAR1" + bytes(40))
    assert "not a Parquet file that can be read" in refused(import_, path).what


@pytest.mark.parametrize("locked", ["file", "folder"])
def test_what_may_not_be_read(locked):
    folder = Path(tempfile.mkdtemp())  # tmp_path lies in a folder that other users cannot enter
    path = write(folder, "d/a.csv", GOOD)
    spec, task = DataSpec(source=str(path.parent)), TaskSpec(name="text-classification")
    assert profile(spec, task).rows["read"] == 4
    try:
        folder.chmod(0o755)
        (path if locked == "file" else path.parent).chmod(0)
        with another_user(), pytest.raises(DataError, match="no permission") as caught:
            profile(spec, task)
        assert caught.value.hint
        with another_user(), pytest.raises(DataError, match="no permission") as caught:
            fingerprint(path)
    finally:
        path.parent.chmod(0o755)
        shutil.rmtree(folder)


@contextmanager
def another_user():
    """Permissions do not bind root: be nobody for a moment."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_source_that_changed_since_it_was_planned(tmp_path):
    spec = DataSpec(source=str(write(tmp_path, "a.csv", GOOD))).plain()
    spec |= {"task": TaskSpec(name="text-classification").plain(), "source_digest": "sha256:00", "uploads": None}
    with pytest.raises(DataError, match="has changed"):
        run(spec, {}, tmp_path, NullContext())
