"""Reads the messages of a conversation: what a template can print, and nothing it would trip over."""

from __future__ import annotations

import json
from typing import Any

from llmo.serve.body import deep
from llmo.serve.openai.errors import invalid
from llmo.serve.openai.fields import Fields, kind

MOST_MESSAGES = 4096
_MOST_PARTS = 1024
_LONGEST_NAME = 256
_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def messages_of(fields: Fields, name: str = "messages") -> list[dict[str, Any]]:
    """The messages as templates take them: contents are texts, a developer is the system, arguments are objects."""
    found = fields.items(name, MOST_MESSAGES)
    if not found:
        raise invalid(f"'{name}' is a list of at least one message", name, code="missing_required_parameter")
    return [message(value, f"{name}[{index}]") for index, value in enumerate(found)]


def message(value: Any, where: str) -> dict[str, Any]:
    """One message. Raises InputError for an unknown role, for no content where there must be some, and the like."""
    if not isinstance(value, dict):
        raise invalid(f"a message is an object, not {kind(value)}", where, code="invalid_type")
    fields = Fields(value, f"{where}.")
    role = fields.get("role")
    if role not in _ROLES:
        shown = f"'{role[:40]}'" if isinstance(role, str) else kind(role)
        raise invalid(f"the role is one of {', '.join(_ROLES)}, not {shown}", f"{where}.role", code="invalid_value")
    calls = _calls(fields) if role == "assistant" else None
    content = content_of(fields.get("content"), f"{where}.content")
    if role != "tool" and not calls and (content is None or not content.strip()):
        raise invalid(f"the content of the {role}'s message is empty", f"{where}.content", hint="leave it out")
    if role == "tool" and content is None:
        raise invalid("what the tool returned is missing", f"{where}.content")
    found: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": content or ""}
    if calls:
        found["tool_calls"] = calls
    for name in ("name", "tool_call_id"):
        text = fields.text(name, _LONGEST_NAME)
        if text is not None:
            found[name] = text
    if role == "tool" and "tool_call_id" not in found:
        raise invalid("a tool's message says which call it answers", f"{where}.tool_call_id")
    return found


def content_of(value: Any, where: str) -> str | None:
    """A text, or the parts of one joined by line breaks; None for null."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid(f"content is a text or a list of parts, not {kind(value)}", where, code="invalid_type")
    if len(value) > _MOST_PARTS:
        raise invalid(f"content holds at most {_MOST_PARTS} parts", where, code="array_above_max_length")
    texts = []
    for index, part in enumerate(value):
        at = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise invalid(f"a part is an object, not {kind(part)}", at, code="invalid_type")
        if part.get("type") not in _TEXT_PARTS:
            raise invalid("this model reads text only", f"{at}.type", code="invalid_value", hint="send parts of text")
        text = part.get("refusal" if part["type"] == "refusal" else "text")
        if not isinstance(text, str):
            raise invalid(f"the text of a part is a string, not {kind(text)}", f"{at}.text", code="invalid_type")
        texts.append(text)
    return "\n".join(texts)


def _calls(fields: Fields) -> list[dict[str, Any]]:
    found = []
    for index, value in enumerate(fields.items("tool_calls", _MOST_PARTS) or []):
        at = fields.param(f"tool_calls[{index}]")
        if not isinstance(value, dict):
            raise invalid(f"a call is an object, not {kind(value)}", at, code="invalid_type")
        call = Fields(value, f"{at}.")
        function = call.object("function")
        if function is None:
            raise invalid("a call names its function", f"{at}.function", code="missing_required_parameter")
        name = function.text("name", _LONGEST_NAME)
        if not name:
            raise invalid("a function has a name", function.param("name"), code="missing_required_parameter")
        arguments = arguments_of(function.get("arguments"), function.param("arguments"))
        id = call.text("id", _LONGEST_NAME)
        found.append({"id": id or "", "type": "function", "function": {"name": name, "arguments": arguments}})
    return found


def arguments_of(value: Any, where: str) -> Any:
    """The JSON object in a string, as templates print it."""
    if not isinstance(value, str):
        raise invalid(f"arguments are JSON in a string, not {kind(value)}", where, code="invalid_type")
    try:
        found = json.loads(value or "{}")
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or deep(found):
        raise invalid("arguments are a JSON object in a string", where, code="invalid_value")
    return found
