"""Tools: how they are declared and forced, and calls found in text that comes in any pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmo.errors import InputError
from llmo.serve.openai.fields import Fields
from llmo.serve.openai.tools import ToolCall, ToolReader, tools_of

NAMES = frozenset({"f", "g"})


def tool(name: str, **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", **parameters}}}


def read(text: str, cuts: list[int]) -> tuple[str, list[ToolCall]]:
    reader = ToolReader(NAMES)
    found: list[str | ToolCall] = []
    left = text
    for cut in [*cuts, len(text)]:
        found += reader.add(left[:cut])
        left = left[cut:]
    found += reader.end()
    texts = "".join(one for one in found if isinstance(one, str))
    return texts, [one for one in found if isinstance(one, ToolCall)]


F1, G2 = ToolCall("f", '{"a": 1}'), ToolCall("g", '{"b": "é"}')
CASES: list[tuple[str, str, list[ToolCall]]] = [
    ("just text", "just text", []),
    ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [F1]),
    ('Sure. <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>', "Sure.", [F1]),
    (
        '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n'
        '<tool_call>{"name": "g", "arguments": {"b": "é"}}</tool_call>',
        "",
        [F1, G2],
    ),
    ('<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [F1]),
    ('{"name": "f", "parameters": {"a": 1}}', "", [F1]),
    ('  [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": "{\\"b\\": \\"é\\"}"}]', "", [F1, G2]),
    ('{"name": "f"}', "", [ToolCall("f", "{}")]),
    ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
    ('{"answer": 42}', '{"answer": 42}', []),
    ('{"name": "f", "arg', '{"name": "f", "arg', []),
    ("[1, 2]", "[1, 2]", []),
    ("<tool_call>nonsense</tool_call> after", "<tool_call>nonsense</tool_call> after", []),
    ("a < b <tool", "a < b <tool", []),
    ("", "", []),
]


@pytest.mark.parametrize(("text", "texts", "calls"), CASES)
@given(cuts=st.lists(st.integers(1, 9), max_size=40))
def test_calls_are_found_however_the_text_is_cut(text: str, texts: str, calls: list[ToolCall], cuts: list[int]) -> None:
    assert read(text, cuts) == (texts, calls)


def test_text_is_held_back_only_while_it_may_become_a_call() -> None:
    reader = ToolReader(NAMES)
    assert [reader.add(piece) for piece in ("Hello", " <to", "p>", "{", " ")] == [["Hello"], [], [" <top>"], ["{"], []]
    assert reader.end() == [" "]


def test_a_forced_call_is_a_schema_of_its_parameters() -> None:
    shared = {"$defs": {"x": {"type": "integer"}}, "properties": {"n": {"$ref": "#/$defs/x"}}}
    one = tools_of(Fields({"tools": [tool("f", **shared)], "tool_choice": "required"}))
    assert one.forced is not None
    schema = json.loads(one.forced.text)
    assert schema["properties"]["name"]["enum"] == ["f"]
    assert schema["properties"]["arguments"]["properties"]["n"] == {"$ref": "#/properties/arguments/$defs/x"}
    both = tools_of(Fields({"tools": [tool("f"), tool("g", **shared)], "tool_choice": "required"}))
    assert both.forced is not None
    inner = json.loads(both.forced.text)["anyOf"][1]["properties"]["arguments"]["properties"]["n"]
    assert inner == {"$ref": "#/anyOf/1/properties/arguments/$defs/x"}
    chosen = {"type": "function", "function": {"name": "g"}}
    named = tools_of(Fields({"tools": [tool("f"), tool("g")], "tool_choice": chosen}))
    assert named.forced is not None
    assert json.loads(named.forced.text)["properties"]["name"]["enum"] == ["g"]
    assert named.names == {"f", "g"}


def test_none_hides_the_tools_and_auto_shows_them() -> None:
    assert tools_of(Fields({"tools": [tool("f")], "tool_choice": "none"})).declared is None
    auto = tools_of(Fields({"tools": [tool("f")]}))
    assert auto.forced is None
    assert auto.declared is not None
    assert auto.declared[0]["function"]["name"] == "f"
    flat = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    assert tools_of(Fields({"tools": [flat]})).names == {"f"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": "f"}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("f")] * 129}, "tools"),
        ({"tools": [tool("f", items={"$ref": "#"})]}, "tools[0].function.parameters"),
        ({"tools": [tool("f")], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "h"}}}, "tool_choice"),
        ({"tools": [tool("f")], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_what_is_wrong_with_tools_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InputError) as caught:
        tools_of(Fields(body))
    assert caught.value.where == param
