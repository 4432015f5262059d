"""Whatever JSON a source holds, each row becomes a sound conversation or is dropped with a reason."""

from __future__ import annotations

import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from llmo.data.chat import layouts
from llmo.data.forms.conversational import Conversational
from llmo.data.readers.base import RawRow, ReadLog
from llmo.data.stored import MESSAGES, PREFERENCE
from llmo.errors import DataError
from llmo.specs import DataSpec, TaskSpec

_KEYS = "role from content value text name tool_calls function_call function arguments type id"
_ROLES = "system developer user assistant tool human gpt function_call observation USER nobody"
_COLUMNS = "messages turns prompt instruction input completion output chosen rejected system tools text label id"
KEYS = st.sampled_from(_KEYS.split())
ROLES = st.sampled_from(_ROLES.split())
SCRAPS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | ROLES
ANYTHING = st.recursive(
    SCRAPS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
CONTENT = st.text(max_size=8) | ANYTHING
MESSAGE = (
    st.fixed_dictionaries({"role": ROLES, "content": CONTENT}, optional={"tool_calls": ANYTHING, "name": ANYTHING})
    | st.fixed_dictionaries({"from": ROLES, "value": CONTENT})
    | ANYTHING
)
TALK = st.lists(MESSAGE, max_size=5)
CELL = TALK | TALK.map(json.dumps) | ANYTHING
COLUMNS = st.sampled_from(_COLUMNS.split())
ROW = st.dictionaries(COLUMNS, CELL, min_size=1, max_size=5)


@given(st.lists(ROW, min_size=1, max_size=3))
def test_no_row_breaks_an_import(tmp_path_factory, rows):
    spec = DataSpec(source="a.jsonl")
    form = Conversational(spec, TaskSpec(name="generation"))
    raw = [RawRow(values, f"a.jsonl:{i}") for i, values in enumerate(rows)]
    log = ReadLog(tmp_path_factory.getbasetemp())
    try:
        columns = form.choose(list(dict.fromkeys(name for row in rows for name in row)), raw, "a.jsonl")
    except DataError:
        return
    kept = []
    for item in raw:
        row = form.read(item, columns, log)
        if row.flaw is None:
            form.clean(row, log.changed)
        assert isinstance(row.text, str)
        if form.lacks(row) is None:
            kept.append(row)
    form.gather(kept)
    form.held_out(kept)
    for row in kept:
        stored = {column.name: column.value(row) for column in (MESSAGES, PREFERENCE)[columns.layout == "preference"]}
        assert_sound(stored, layouts.SHAPES[columns.layout])
        again = Counter()
        before = stored["messages"]
        form.clean(row, again)
        assert {column.name: column.value(row) for column in MESSAGES}["messages"] == before
        assert not +again, "cleaning twice changes nothing more"


def assert_sound(stored, shape):
    assert stored["text"].encode()
    if shape == "text":
        assert stored["messages"] is None
        return
    messages = json.loads(stored["messages"])
    assert all(m["role"] in ("system", "developer", "user", "assistant", "tool") for m in messages)
    assert all(isinstance(m["content"], str) or m["tool_calls"] for m in messages)
    ends = [json.loads(stored["chosen"])[-1], json.loads(stored["rejected"])[-1]] if shape == "preference" else messages
    assert ends[-1]["role"] == "assistant"
    assert any(m["role"] == "user" for m in messages)
