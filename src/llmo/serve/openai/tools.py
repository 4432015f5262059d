"""Tools a model may call: how they are declared, forced, and found again in what it wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmo.engines.generation import Grammar
from llmo.serve.openai import grammar
from llmo.serve.openai.errors import invalid
from llmo.serve.openai.fields import Fields, kind

_MOST = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"


@dataclass(frozen=True, slots=True)
class Tools:
    """`declared` is what the template prints (None when nothing may be called), `names` what may be called, and
    `forced` the grammar of an answer that must be a call."""

    declared: list[dict[str, Any]] | None = None
    names: frozenset[str] = frozenset()
    forced: Grammar | None = None


def tools_of(fields: Fields) -> Tools:
    """`tools` and `tool_choice` of a chat request."""
    found = fields.items("tools", _MOST)
    declared = [_tool(value, fields.param(f"tools[{index}]")) for index, value in enumerate(found or [])]
    choice = fields.get("tool_choice")
    if not declared:
        if choice not in (None, "none", "auto"):
            raise invalid("'tool_choice' asks for a call, and there are no tools", "tool_choice", code="invalid_value")
        return Tools()
    functions = [tool["function"] for tool in declared]
    match choice:
        case None | "auto":
            chosen: list[dict[str, Any]] = []
        case "none":
            return Tools()
        case "required":
            chosen = functions
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            chosen = [function for function in functions if function["name"] == name]
            if not chosen:
                raise invalid(f"no tool is called '{name[:64]}'", "tool_choice", code="invalid_value")
        case _:
            raise invalid(
                "'tool_choice' is none, auto, required, or names a function", "tool_choice", code="invalid_value"
            )
    names = frozenset(function["name"] for function in functions)
    forced = grammar.of_schema(_calls_schema(chosen), "tools") if chosen else None
    return Tools(declared, names, forced)


def _tool(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(f"a tool is an object, not {kind(value)}", where, code="invalid_type")
    fields = Fields(value, f"{where}.")
    if fields.get("type") != "function":
        raise invalid("only tools of the type 'function' can be called", fields.param("type"), code="invalid_value")
    function = fields.object("function")
    if function is None:  # flat, as the Responses API declares them
        function = fields
    name = function.text("name", 64)
    if name is None or not _NAME.fullmatch(name):
        raise invalid(
            "a function's name is 1 to 64 letters, digits, dots, _ or -", function.param("name"), code="invalid_value"
        )
    parameters = function.get("parameters")
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    grammar.of_schema(parameters, function.param("parameters"))
    description = function.text("description", 1 << 16) or ""
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _calls_schema(functions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One call of one of the functions. References within parameters start at their own root, so they move along."""
    calls: list[dict[str, Any]] = []
    for number, function in enumerate(functions):
        at = f"#/anyOf/{number}/properties/arguments" if len(functions) > 1 else "#/properties/arguments"
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "enum": [function["name"]]},
                    "arguments": _moved(function["parameters"], at),
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _moved(node: Any, to: str) -> Any:
    if isinstance(node, list):
        return [_moved(inner, to) for inner in node]
    if not isinstance(node, dict):
        return node
    return {
        key: to + inner[1:] if key == "$ref" and isinstance(inner, str) else _moved(inner, to)
        for key, inner in node.items()
    }


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call; `arguments` is JSON in a string, as OpenAI has it."""

    name: str
    arguments: str


class ToolReader:
    """Finds calls in the text of one answer as it grows: `<tool_call>{...}</tool_call>` (Hermes, Qwen and their
    like), or an answer that is nothing but `{"name": ..., "arguments" or "parameters": {...}}` or a list of those.

    What may become a call is held back; what turns out to be none comes out as the text it is. White space before a
    call is dropped.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names
        self._held = ""
        self._inside = False
        self._plain = True  # whether all of it may still be one JSON value
        self._found = False

    def add(self, text: str) -> list[str | ToolCall]:
        """Texts and calls that are certain now, in their order."""
        self._held += text
        if self._plain and self._held.lstrip()[:1] in ("", "{", "["):
            return []
        self._plain = False
        return self._marked()

    def end(self) -> list[str | ToolCall]:
        """The rest, when no text follows."""
        if self._plain:
            calls = self._calls(self._held)
            if calls:
                return [*calls]
        found = self._marked()
        rest, self._held = self._held, ""
        if self._inside:
            return [*found, *(self._calls(rest) or (_OPEN + rest,))]
        return [*found, rest] if rest.strip() or (rest and not self._found) else found

    def _marked(self) -> list[str | ToolCall]:
        found: list[str | ToolCall] = []
        while True:
            before, mark, after = self._held.partition(_CLOSE if self._inside else _OPEN)
            if not mark:
                break
            if self._inside:
                found += self._calls(before) or (_OPEN + before + _CLOSE,)
            elif before.strip():
                found.append(before.rstrip())
            self._inside, self._held = not self._inside, after
        if not self._inside:
            sure = self._held[: len(self._held) - _beginning(self._held)].rstrip()
            self._held = self._held[len(sure) :]
            if sure:
                found.append(sure)
        return found

    def _calls(self, text: str) -> list[ToolCall]:
        """The calls in a JSON text; none when it is no JSON, or when one of them is no call of a tool we have."""
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = [self._call(one) for one in (value if isinstance(value, list) else [value])]
        found = [call for call in calls if call] if all(calls) else []
        self._found = self._found or bool(found)
        return found

    def _call(self, value: Any) -> ToolCall | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            return ToolCall(value["name"], arguments)
        return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))


def _beginning(text: str) -> int:
    """How many of the last characters may be the beginning of the opening mark."""
    for size in range(min(len(_OPEN) - 1, len(text)), 0, -1):
        if _OPEN.startswith(text[-size:]):
            return size
    return 0
