"""Reading a file that another process appends to, in pieces and with rubbish in it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmo.kernel import tail


def note(text: str) -> bytes:
    return json.dumps({"at": 1.0, "kind": "note", "data": {"text": text}}).encode() + b"\n"


def test_a_torn_line_is_left_for_next_time(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert tail.read(path, 0) == ([], 0)
    whole, torn = note("one"), note("two")
    path.write_bytes(whole + torn[:-5])
    lines, offset = tail.read(path, 0)
    assert lines == [(1.0, "note", {"text": "one"})]
    assert offset == len(whole)
    assert tail.read(path, offset) == ([], offset)
    path.write_bytes(whole + torn)
    assert tail.read(path, offset) == ([(1.0, "note", {"text": "two"})], len(whole + torn))


@given(st.lists(st.text(), max_size=10), st.lists(st.integers(0, 400), max_size=10))
def test_any_way_of_cutting_gives_the_same_lines(texts: list[str], cuts: list[int]) -> None:
    data = b"".join(note(text) for text in texts)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.jsonl"
        offset, found = 0, []
        for end in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
            path.write_bytes(data[:end])
            lines, offset = tail.read(path, offset)
            found += [line[2]["text"] for line in lines]
    assert found == texts


@pytest.mark.parametrize(
    "line",
    [
        b"no json",
        b"[]",
        b'"text"',
        b"{}",
        b'{"at": 1, "kind": "note"}',
        b'{"at": 1, "kind": "note", "data": {"text": 3}}',
        b'{"at": "now", "kind": "note", "data": {"text": ""}}',
        b'{"at": true, "kind": "note", "data": {"text": ""}}',
        b'{"at": 1, "kind": "state", "data": {}}',
        b'{"at": 1, "kind": ["note"], "data": {}}',
        b'{"at": 1, "kind": "spawn", "data": {"key": "a", "op": "b", "spec": [], "inputs": {}, "name": ""}}',
        *(
            b'{"at": 1, "kind": "spawn", "data": {"key": "a", "op": "b", "spec": {}, "inputs": {}, "name": "", '
            b'"needs": %b}}' % needs
            for needs in (b'"cores"', b"[]", b'{"cores": "2"}', b'{"memory": null}')
        ),
        b'{"at": 1, "kind": "note", "data": {"text": "\\ud800"}}',
        b"[" * 100_000,
        b"1" * 10_000,
        b"\xff\xfe\x00",
    ],
)
def test_what_is_no_event_becomes_an_error_that_quotes_it(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(line + b"\n" + note("after"))
    lines, offset = tail.read(path, 0)
    assert [kind for _, kind, _ in lines] == ["error", "note"]
    assert lines[0][2]["text"].startswith("the job wrote ")
    assert offset == path.stat().st_size


def test_a_line_without_an_end_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail, "LIMIT", 1000)
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"x" * 1500 + b"\n" + note("after"))
    found, offset = [], 0
    while (answer := tail.read(path, offset))[1] != offset:
        found += [kind for _, kind, _ in answer[0]]
        offset = answer[1]
    assert found == ["error", "error", "note"]


def test_nan_is_text(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"at": 1, "kind": "progress", "data": {"step": 1, "loss": NaN, "x": -Infinity}}\n')
    assert tail.read(path, 0)[0] == [(1.0, "progress", {"step": 1, "loss": "NaN", "x": "-Infinity"})]
