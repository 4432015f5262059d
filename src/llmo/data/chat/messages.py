"""Brings the messages of a source, whatever it calls roles and contents, into OpenAI's form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llmo.data.chat import tools
from llmo.data.conversation import Message
from llmo.data.jsonvalue import dumped, parsed
from llmo.data.row import Drop, Flawed

ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text")
_CALLS = "function_call"  # ShareGPT: a turn whose value is the call
_ROLES = {
    "system": "system 系统",
    "developer": "developer",
    "user": "user human prompter 用户",
    "assistant": "assistant gpt chatgpt bot chatbot ai model bing bard claude 助手",
    "tool": "tool function observation tool_response function_response",
    _CALLS: "function_call tool_call tool_calls",
}
ROLES = {alias: role for role, aliases in _ROLES.items() for alias in aliases.split()}
_KEPT = frozenset((*ROLE_KEYS, *_CONTENT_KEYS, "name", "tool_calls", "tool_call_id", "function_call"))


def read(value: Any, changed: Counter[str]) -> list[Message]:
    """Messages from a list of them, or from JSON text of one. Raises Flawed, saying which message is wrong.

    Strings instead of messages are turns of a user and an assistant in alternation. Keys of a message that have no
    meaning here are left out and counted in `changed`.
    """
    items = _items(value)
    if items and all(isinstance(item, str) for item in items):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(items)]
    found: list[Message] = []
    for number, item in enumerate(items, 1):
        if not isinstance(item, Mapping):
            raise Flawed(Drop.UNKNOWN_ROLE, f"message {number} is a {type(item).__name__} without a role")
        pairs = _turns(item)
        found += pairs if pairs else [_message(item, number, changed)]
    return found


def text_of(value: Any, what: str) -> str:
    """A value as text; parts of text (`[{"type": "text", "text": ...}]`) are joined. Raises Flawed."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, list):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in value]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
        kinds = {str(p.get("type", "object")) if isinstance(p, Mapping) else type(p).__name__ for p in value}
        raise Flawed(Drop.NOT_TEXT, f"{what} holds {', '.join(sorted(kinds - {'text'}))}")
    raise Flawed(Drop.NOT_TEXT, f"{what} is a {type(value).__name__}, not a text")


def is_messages(value: Any, *, turns: bool = False) -> bool:
    """True for a list of messages, and for JSON text of one; with `turns`, for a list of strings too.

    In JSON text the roles must be known ones, since an answer may well be JSON itself.
    """
    written = isinstance(value, str)
    if not isinstance(value, list) and not (written and value.lstrip()[:1] == "["):
        return False
    try:
        items = _items(value)
    except Flawed:
        return False
    if turns and items and all(isinstance(item, str) for item in items):
        return True
    return bool(items) and all(isinstance(item, Mapping) and _has_role(item, written) for item in items)


def _has_role(item: Mapping[str, Any], known: bool) -> bool:
    key = _key(item, ROLE_KEYS)
    return bool(_turns(item)) or bool(key and (not known or str(item[key]).strip().casefold() in ROLES))


def kind(value: Any) -> str:
    """How messages are written: "openai", "sharegpt" or "turns"."""
    first = next(iter(_items(value)), None)
    if isinstance(first, Mapping):
        return "openai" if "role" in first else "sharegpt"
    return "turns"


def _items(value: Any) -> Sequence[Any]:
    if isinstance(value, str) and value.strip():
        try:
            value = parsed(value)
        except ValueError:
            raise Flawed(Drop.NOT_TEXT, "the messages are neither a list nor JSON of one") from None
    if value is None or value == "":
        return []
    if not isinstance(value, list):
        raise Flawed(Drop.NOT_TEXT, f"the messages are a {type(value).__name__}, not a list")
    return value


def _message(item: Mapping[str, Any], number: int, changed: Counter[str]) -> Message:
    told = item.get(_key(item, ROLE_KEYS))
    role = ROLES.get(told.strip().casefold()) if isinstance(told, str) else None
    if role is None:
        raise Flawed(Drop.UNKNOWN_ROLE, f"message {number} is by '{str(told)[:40]}'")
    content = item.get(_key(item, _CONTENT_KEYS))
    if role == _CALLS:
        return {"role": "assistant", "content": None, "tool_calls": tools.calls(content)}
    if role == "tool" and isinstance(content, (Mapping, list)):
        content = _result(content, number)
    message: Message = {"role": role, "content": text_of(content, f"message {number}")}
    called = item.get("tool_calls") or item.get("function_call")
    if role == "assistant" and called:
        message["tool_calls"] = tools.calls(called)
        message["content"] = message["content"] or None
    for key in ("name", "tool_call_id"):
        if isinstance(item.get(key), str) and item[key]:
            message[key] = item[key]
    changed["message_keys"] += sum(1 for key, value in item.items() if key not in _KEPT and value is not None)
    return message


def _result(value: Any, number: int) -> str:
    """What a tool gave back: parts of text as they are, any other object as JSON."""
    if isinstance(value, list) and value and all(isinstance(p, Mapping) and p.get("type") == "text" for p in value):
        return text_of(value, f"message {number}")
    try:
        return dumped(value)
    except ValueError:
        raise Flawed(Drop.NOT_TEXT, f"message {number} holds what JSON cannot say") from None


def _turns(item: Mapping[str, Any]) -> list[Message]:
    """`{"human": ..., "assistant": ...}`: an object whose keys are roles, one turn each."""
    roles = [ROLES.get(str(key).strip().casefold()) for key in item]
    if not roles or not set(roles) <= {"system", "user", "assistant"}:
        return []
    said = zip(roles, item.items(), strict=True)
    return [{"role": role, "content": text_of(value, f"'{key}'")} for role, (key, value) in said if value is not None]


def _key(item: Mapping[str, Any], keys: Sequence[str]) -> str:
    return next((key for key in keys if key in item), "")
