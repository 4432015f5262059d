"""Reads one row of any layout into a conversation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from llmo.data.chat import messages, preference
from llmo.data.chat.messages import text_of
from llmo.data.chat.tools import tools
from llmo.data.conversation import INSTRUCTIONS, Conversation, Message
from llmo.data.named import Columns
from llmo.data.row import Drop, Flawed


def conversation(values: Mapping[str, Any], columns: Columns, changed: Counter[str]) -> Conversation:
    """The conversation as the source has it: neither cleaned nor held to an order. Raises Flawed."""
    asked = [*_history(_value(values, columns.history)), *_prompt(values, columns, changed)]
    if columns.chosen:
        pair = _value(values, columns.chosen), _value(values, columns.rejected)
        found = preference.read(asked, *pair, changed)
    else:
        found = Conversation([*asked, *_answer(_value(values, columns.answer), changed)])
    found.tools = tools(_value(values, columns.tools))
    system = text_of(_value(values, columns.system), f"'{columns.system}'")
    if system.strip() and not (found.messages and found.messages[0]["role"] in INSTRUCTIONS):
        found.messages.insert(0, {"role": "system", "content": system})
    return found


def _value(values: Mapping[str, Any], name: str) -> Any:
    return values.get(name) if name else None


def _prompt(values: Mapping[str, Any], columns: Columns, changed: Counter[str]) -> list[Message]:
    if columns.messages:
        return messages.read(_value(values, columns.messages), changed)
    if not columns.prompt:
        return []
    value = _value(values, columns.prompt)
    if messages.is_messages(value):
        return messages.read(value, changed)
    prompt = text_of(value, f"'{columns.prompt}'")
    context = text_of(_value(values, columns.input), f"'{columns.input}'")
    said = "\n\n".join(part for part in (prompt, context) if part.strip())
    return [{"role": "user", "content": said}]


def _answer(value: Any, changed: Counter[str]) -> list[Message]:
    """None at all when it is missing, so that the reason is a missing answer and not an empty one."""
    if messages.is_messages(value):
        return messages.read(value, changed)
    text = text_of(value, "the answer")
    return [{"role": "assistant", "content": text}] if text.strip() else []


def _history(value: Any) -> list[Message]:
    """Earlier turns, as Alpaca writes them: `[[question, answer], ...]`."""
    found: list[Message] = []
    for pair in [] if value in (None, "") else value if isinstance(value, list) else [value]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Flawed(Drop.BROKEN_TURNS, "the history is not a list of questions with their answers")
        found += [
            {"role": "user", "content": text_of(pair[0], "the history")},
            {"role": "assistant", "content": text_of(pair[1], "the history")},
        ]
    return found
