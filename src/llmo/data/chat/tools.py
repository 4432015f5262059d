"""Brings tools and calls of tools into OpenAI's form: arguments are a JSON string, everything else is an object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmo.data.jsonvalue import dumped, parsed
from llmo.data.row import Drop, Flawed


def tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools a conversation may call: a list, or JSON text of one; None when there are none. Raises Flawed."""
    items = _list(value, "the tools")
    found = []
    for number, item in enumerate(items, 1):
        function = item.get("function") if isinstance(item, Mapping) and "function" in item else item
        if not isinstance(function, Mapping) or not _name(function):
            raise Flawed(Drop.BROKEN_TOOLS, f"tool {number} has no name")
        _sound(function, f"tool {number}")
        found.append({"type": "function", "function": dict(function)})
    return found or None


def calls(value: Any) -> list[dict[str, Any]]:
    """What an assistant calls: a list, one call, or JSON text of either. Raises Flawed."""
    return [_call(item, number) for number, item in enumerate(_list(value, "the tool calls"), 1)]


def _call(item: Any, number: int) -> dict[str, Any]:
    function = item.get("function") if isinstance(item, Mapping) and "function" in item else item
    if not isinstance(function, Mapping) or not _name(function):
        raise Flawed(Drop.BROKEN_TOOLS, f"tool call {number} has no name")
    arguments = function.get("arguments", function.get("parameters"))
    if not isinstance(arguments, str):
        arguments = _sound({} if arguments is None else arguments, f"tool call {number}")
    identity = item.get("id")
    told = {"id": str(identity)} if identity is not None else {}
    return {**told, "type": "function", "function": {"name": _name(function), "arguments": arguments}}


def _list(value: Any, what: str) -> list[Any]:
    if isinstance(value, str) and value.strip():
        try:
            value = parsed(value)
        except ValueError:
            raise Flawed(Drop.BROKEN_TOOLS, f"{what} are not JSON") from None
    if isinstance(value, Mapping):
        return [value]
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise Flawed(Drop.BROKEN_TOOLS, f"{what} are a {type(value).__name__}, not a list")
    return value


def _name(function: Mapping[str, Any]) -> str:
    name = function.get("name")
    return name.strip() if isinstance(name, str) else ""


def _sound(value: Any, what: str) -> str:
    try:
        return dumped(value)
    except ValueError:
        raise Flawed(Drop.BROKEN_TOOLS, f"{what} holds what JSON cannot say") from None
