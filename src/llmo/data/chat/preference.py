"""Reads two answers of which one was preferred: beside their prompt, or as whole conversations that begin alike."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from llmo.data.chat import messages
from llmo.data.conversation import Conversation, Message, said
from llmo.data.deduplicate import text_key
from llmo.data.row import Drop, Flawed

_TURN = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant): ?")


def read(prompt: list[Message], chosen: Any, rejected: Any, changed: Counter[str]) -> Conversation:
    """`prompt` with its answers; what whole conversations have in common is theirs. Raises Flawed where they differ."""
    one, other = _answer(chosen, "chosen", changed), _answer(rejected, "rejected", changed)
    if not one or not other:
        raise Flawed(Drop.NO_ANSWER, f"there is no {'chosen' if not one else 'rejected'} answer")
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    if shared == len(one) == len(other):
        raise Flawed(Drop.SAME_ANSWERS, "chosen and rejected are the same")
    if one[0]["role"] == "assistant":
        return Conversation(prompt, chosen=one, rejected=other)
    begin = one[:shared]
    if prompt and not _same(begin[-len(prompt) :], prompt) and not _same(prompt[:shared], begin):
        raise Flawed(Drop.BROKEN_TURNS, "chosen and rejected do not begin with the prompt")
    if shared == min(len(one), len(other)) or {one[shared]["role"], other[shared]["role"]} != {"assistant"}:
        raise Flawed(Drop.BROKEN_TURNS, "chosen and rejected do not part at an answer")
    return Conversation(begin, chosen=one[shared:], rejected=other[shared:])


def _same(some: Sequence[Message], others: Sequence[Message]) -> bool:
    """Whether the same is said; `messages` beside the answers may go on to the chosen one."""
    return [text_key(said(m)) for m in some] == [text_key(said(m)) for m in others]


def _answer(value: Any, what: str, changed: Counter[str]) -> list[Message]:
    if messages.is_messages(value):
        return messages.read(value, changed)
    text = messages.text_of(value, what)
    whole = _TURN.split(text)
    if len(whole) > 3 and whole[1] == "Human":  # Anthropic's form: "\n\nHuman: ...\n\nAssistant: ..."
        turns = zip(whole[1::2], whole[2::2], strict=True)
        return [{"role": messages.ROLES[role.casefold()], "content": part} for role, part in turns]
    return [{"role": "assistant", "content": text}] if text.strip() else []
