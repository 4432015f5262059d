"""The corpus' YAML is read as text alone: no types, no aliases, no tags, and no more than a file may hold."""

from __future__ import annotations

import pytest

from llmo.data.readers.base import MAX_CELL, ReadLog
from llmo.data.readers.chatterbot import read
from llmo.errors import DataError
from llmo.specs import DataSpec


def rows(tmp_path, text):
    path = tmp_path / "a.yml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return [(row.values["turns"], row.place) for row in read(path, DataSpec(source=str(path)), ReadLog(path))]


def test_turns_are_text_whatever_yaml_makes_of_them(tmp_path):
    text = (
        "categories:\n- a: [b, {c: d}]\nconversations:\n- - Is it?\n  - Yes\n  - 1e3\n  - null\n"
        '- - "x: y"\n  - >\n    a\n    b\n- alone\n'
    )
    assert rows(tmp_path, text) == [
        (["Is it?", "Yes", "1e3", "null"], "a.yml:4"),
        (["x: y", "a b\n"], "a.yml:8"),
        (["alone"], "a.yml:12"),
    ]


BOMB = "a: &a [x,x]\n" + "".join(f"{b}: &{b} [*{a},*{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "says", "where"),
    [
        (BOMB, "anchors and aliases", "a.yml:1"),
        ("conversations:\n- - *a\n", "anchors and aliases", "a.yml:2"),
        ("conversations:\n- - !!python/object/apply:os.system [ls]\n", "python/object/apply", "a.yml:2"),
        ("conversations:\n- - one\n  - - two\n", "a turn of a conversation is not a text", "a.yml:2"),
        ("conversations:\n- a: b\n", "a turn of a conversation is not a text", "a.yml:2"),
        ("conversations: none\n", "conversations are not a list", "a.yml:1"),
        ("categories:\n- a\n", "holds no conversations", "a.yml"),
        ("- - one\n  - two\n", "no mapping with the key 'conversations'", "a.yml"),
        ("conversations:\n- - 'one\n", "broken YAML", "a.yml:"),
        ("conversations:\n- - one\n - two\n", "broken YAML", "a.yml:"),
        ("conversations: " + "[" * 100_000, "a turn of a conversation is not a text", "a.yml:1"),
        ("conversations:\n- - \x01\n", "broken YAML", "a.yml"),
        ("", "empty", "a.yml"),
    ],
)
def test_other_yaml_is_refused(tmp_path, text, says, where):
    with pytest.raises(DataError) as caught:
        rows(tmp_path, text)
    assert says in caught.value.what
    assert caught.value.where.startswith(where)
    assert caught.value.hint


def test_a_turn_that_is_too_long(tmp_path):
    with pytest.raises(DataError, match="more than 10,000,000 characters"):
        rows(tmp_path, "conversations:\n- - " + "x" * (MAX_CELL + 1))


def test_a_file_that_is_too_long(tmp_path):
    path = tmp_path / "a.yml"
    with path.open("wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(DataError, match="more than 64 MiB"):
        list(read(path, DataSpec(source=str(path)), ReadLog(path)))
