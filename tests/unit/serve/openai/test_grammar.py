"""Forms of answers: what is let through to an engine, and what is refused before."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmo.engines.generation import Grammar
from llmo.errors import InputError
from llmo.serve.openai.fields import Fields
from llmo.serve.openai.grammar import of_schema, repeats_a_repetition, wanted


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b",
        "(a*)*",
        "((a+))+",
        "(?:a+)*",
        "(x|a+){2,}",
        "(?P<n>[a-z]+)+",
        "(\\d+)*x",
        "([)]+)+",
        "(a+?)+",
        "a(b(c+)+)",
    ],
)
def test_a_repetition_of_a_repetition_is_seen(pattern: str) -> None:
    assert repeats_a_repetition(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "a+b*",
        "(a+,)*a+",
        "([a-z]+, )+",
        "(yes|no)+",
        "(a+){2}",
        "(a+){2,3}",
        "(a+)?",
        "\\(a+\\)+",
        "[(a+)+]",
        "(a{2})+",
        "[]+*]+",
        "(ab+|c+d)*",
        ")(",
        "(",
        "a{",
    ],
)
def test_harmless_patterns_are_let_through(pattern: str) -> None:
    assert not repeats_a_repetition(pattern)


def test_which_form_is_asked_for() -> None:
    assert wanted(Fields({})) is None
    assert wanted(Fields({"response_format": {"type": "text"}})) is None
    assert wanted(Fields({"response_format": {"type": "json_object"}})) == Grammar("json_schema", '{"type":"object"}')
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "integer"}}}
    assert wanted(Fields({"response_format": schema})) == Grammar("json_schema", '{"type":"integer"}')
    for name in ("regex", "guided_regex"):
        assert wanted(Fields({name: "a|b", "response_format": {"type": "text"}})) == Grammar("regex", "a|b")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"regex": ""}, "regex"),
        ({"regex": 5}, "regex"),
        ({"regex": "a" * 5000}, "regex"),
        ({"guided_regex": "(a+)+"}, "guided_regex"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": {}}, "response_format.type"),
    ],
)
def test_what_is_wrong_with_a_form_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InputError) as caught:
        wanted(Fields(body))
    assert caught.value.where == param


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"properties": {"child": {"$ref": "#"}}}, "refers to itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"items": {"$ref": "#/$defs/a"}}}}, "itself"),
        ({"properties": {"a": {"properties": {"b": {"$ref": "#/properties/a"}}}}}, "itself"),
        ({"$ref": "https://example.org/schema"}, "another document"),
        ({"$ref": "#/$defs/missing"}, "not there"),
        (nested(80), "levels deep"),
        ({"enum": ["x" * 70_000]}, "characters long"),
    ],
)
def test_schemas_without_end_are_refused(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        of_schema(schema, "schema")


def test_references_that_end_are_followed_once_each() -> None:
    """Each level refers to the next four times: followed by copying, this would be 4 to the 18th."""
    levels = {f"l{n}": {"items": [{"$ref": f"#/$defs/l{n + 1}"}] * 4} for n in range(18)}
    schema = {"$ref": "#/$defs/l0", "$defs": {**levels, "l18": {"type": "integer"}, "a/b": {"type": "null"}}}
    assert json.loads(of_schema({**schema, "not": {"$ref": "#/$defs/a~1b"}}, "schema").text)["$ref"] == "#/$defs/l0"
