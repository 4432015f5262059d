"""Holds a conversation to the order of its turns: what is asked is answered, and the last word is an answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llmo.data.conversation import INSTRUCTIONS, Conversation, Message
from llmo.data.row import Drop, Flawed


def settle(conversation: Conversation, changed: Counter[str], *, drop_empty: bool) -> None:
    """Cut what comes after the last answer and instructions that say nothing, and count both.

    Raises Flawed for a conversation without an answer, with an empty one, or with turns in an impossible order.
    """
    _without_empty_instructions(conversation, changed)
    if conversation.chosen is None or conversation.rejected is None:
        conversation.messages = _to_last_answer(conversation.messages, changed)
        _check(conversation.messages, drop_empty)
        return
    conversation.chosen = _to_last_answer(conversation.chosen, changed)
    conversation.rejected = _to_last_answer(conversation.rejected, changed)
    for answer in (conversation.chosen, conversation.rejected):
        _check([*conversation.messages, *answer], drop_empty)
    if conversation.chosen == conversation.rejected:
        raise Flawed(Drop.SAME_ANSWERS, "chosen and rejected are the same")


def _without_empty_instructions(conversation: Conversation, changed: Counter[str]) -> None:
    kept = [m for m in conversation.messages if m["role"] not in INSTRUCTIONS or m["content"].strip()]
    changed["empty_system"] += len(kept) < len(conversation.messages)
    conversation.messages = kept


def _to_last_answer(messages: list[Message], changed: Counter[str]) -> list[Message]:
    end = max((i for i, message in enumerate(messages, 1) if message["role"] == "assistant"), default=0)
    if end == 0:
        raise Flawed(Drop.NO_ANSWER, "there is no message of the assistant" if messages else "there are no messages")
    changed["trailing_turns"] += end < len(messages)
    return messages[:end]


def _check(messages: Sequence[Message], drop_empty: bool) -> None:
    before: Message | None = None
    for number, message in enumerate(messages, 1):
        if message["role"] in INSTRUCTIONS:
            continue
        wrong = _wrong(before, message)
        if wrong:
            raise Flawed(Drop.BROKEN_TURNS, f"message {number} is {wrong}")
        nothing = not message.get("tool_calls") and not (message["content"] or "").strip()
        if nothing and drop_empty and message["role"] != "tool":  # a tool may well give back nothing
            raise Flawed(Drop.EMPTY_CONTENT, f"message {number}, of the {message['role']}, is empty")
        before = message


def _wrong(before: Message | None, message: Message) -> str:
    """What is wrong with a message after the one before it, or an empty string."""
    role, last = message["role"], before["role"] if before else None
    if role == "assistant":
        if before is None:
            return "an answer before any question"
        if last == "assistant" and not (message.get("tool_calls") or before.get("tool_calls")):
            return "a second answer without a question"
    if role == "tool" and last not in ("assistant", "tool"):
        return "the result of a tool that nobody called"
    return ""
