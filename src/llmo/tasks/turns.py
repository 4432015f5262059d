"""Which tokens of a conversation are the model's own answers, whatever its template: found by rendering prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from llmo.errors import DataError, InputError
from llmo.tasks.template import ChatTemplate, Messages
from llmo.tasks.verbatim import Tools, Verbatim


@dataclass(frozen=True, slots=True)
class Spoken:
    """A conversation as tokens; `learnt` marks what the model says, the end token of each answer included."""

    text: str
    ids: list[int]
    learnt: NDArray[np.bool_]


def speak(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Messages, tools: Tools, ends: Sequence[int], since: int = 0
) -> Spoken:
    """Render and tokenise; `ends` are the tokens that end an answer, the first of them for templates that write none.

    Answers before message `since` are given, not learnt, nor is one that nobody asked for (the first message). Of a
    template that writes no end token, only the last answer is learnt, with an end token put after it: a middle one
    would be learnt without an end. Raises DataError for a template that writes a turn otherwise once others follow.
    """
    verbatim = Verbatim.of(tokenizer, messages, tools)
    text, spans = _spans(template, verbatim.messages, verbatim.tools, since)
    ids, stops = verbatim.tokens(tokenizer, text)
    learnt = np.zeros(len(ids), np.bool_)
    is_end = np.isin(ids, list(ends))
    for number, (start, end) in enumerate(spans):
        # A token on the border carries text of the answer; one of white space alone has no width, and lies at its end.
        own = np.flatnonzero((stops > start) & (stops <= end))
        closing = own[is_end[own]]
        if len(closing):
            learnt[own[0] : closing[-1] + 1] = True
        elif number == len(spans) - 1 and end == len(text):
            kept = int((stops <= len(text.rstrip())).sum())
            ids, learnt = [*ids[:kept], ends[0]], np.append(learnt[:kept], True)
            learnt[own[0] if len(own) else kept :] = True
    return Spoken(verbatim.plain(text), ids, learnt)


def closing_token(template: ChatTemplate, tokenizer: Tokenizer) -> int | None:
    """The special token that the template writes after an answer, or None."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text, spans = _spans(template, messages, None, 0)
    except InputError:
        return None  # it wants more than two plain turns: what the model's config says must do
    ids, stops = Verbatim(messages, None).tokens(tokenizer, text)
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    after = [i for i, stop in zip(ids, stops, strict=True) if stop > spans[0][0] and i in special]
    return after[-1] if after else None


def window(learnt: NDArray[np.bool_], limit: int) -> slice:
    """The part of a conversation that is kept when it is longer than `limit` tokens; some answer is always in it.

    The beginning, where the system message is, when an answer begins there; else what leads up to the first answer's
    end, or half context and half answer where that answer is very long.
    """
    spoken = np.flatnonzero(learnt)
    if len(learnt) <= limit or not len(spoken) or spoken[0] < limit:
        return slice(0, limit)
    first = int(spoken[0])
    end = first + int(np.argmin(np.append(learnt[first:], False)))
    begin = max(0, min(end - limit, first - limit // 2))
    return slice(begin, begin + limit)


def _spans(template: ChatTemplate, messages: Messages, tools: Tools, since: int) -> tuple[str, list[tuple[int, int]]]:
    """The text, and of each answer where it begins and where the text of its turn ends."""
    whole = template.render(messages, tools)
    spans = []
    for i, message in enumerate(messages):
        if message.get("role") != "assistant" or i < max(1, since):
            continue
        before = template.render(messages[:i], tools, add_generation_prompt=True)
        after = whole if i + 1 == len(messages) else template.render(messages[: i + 1], tools)
        if not after.startswith(before) or not whole.startswith(after):
            raise DataError(
                f"the chat template writes turn {i + 1} otherwise once its answer or a later turn is there, so what "
                "the model should learn to say cannot be told from what it is given",
                hint="leave out reasoning and tools of earlier turns, split the conversation, or take another template",
            )
        spans.append((len(before), len(after)))
    return whole, spans
