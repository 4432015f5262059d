"""Text that spells a special token stays text: only the template may begin and end turns.

A tokeniser finds its special tokens anywhere in what it is given, so a message that spells `<|im_end|>` would end its
own turn, and could go on as somebody else. So each such spelling gets a mark inside before the template sees it, and
is turned into tokens without the mark and without special tokens. What spells none is left as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, pre_tokenizers

from llmo.errors import InputError
from llmo.tasks.template import Messages

Tools = Sequence[Mapping[str, Any]] | None
_MARKS = range(0xFDD0, 0xFDF0)  # what Unicode keeps free for a program's own use, and no text should hold


@dataclass(frozen=True, slots=True)
class Verbatim:
    """A conversation for the template; `mark` is empty where nothing had to be marked."""

    messages: Messages
    tools: Tools
    mark: str = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer, messages: Messages, tools: Tools = None) -> Verbatim:
        """Raises InputError for texts that hold a special token of one letter, or spell one and hold every possible
        mark."""
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        texts = _texts([messages, tools])
        spelled = {one for one in special if any(one in text for text in texts)}
        if not spelled:
            return cls(messages, tools)
        if any(len(one) == 1 for one in spelled):  # it cannot be broken
            raise InputError("the messages hold a character that only the template may use", hint="leave it out")
        mark = next((mark for mark in map(chr, _MARKS) if not any(mark in text for text in texts)), None)
        if mark is None:
            raise InputError("the messages hold characters that Unicode reserves", hint="send text without U+FDD0")
        # Each spelling is broken after its first character, those that overlap too.
        begins = re.compile(f"(?=(?:{'|'.join(re.escape(one) for one in special)}))(.)", re.DOTALL)
        return cls(_marked(messages, begins, mark), None if tools is None else _marked(tools, begins, mark), mark)

    def plain(self, text: str) -> str:
        """What the template wrote, without the marks."""
        return text.replace(self.mark, "") if self.mark else text

    def tokens(self, tokenizer: Tokenizer, text: str) -> tuple[list[int], NDArray[np.int64]]:
        """Ids of what the template wrote, and where each ends in it; the template writes its special tokens, so none
        are added."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        found = tokenizer.encode(text, add_special_tokens=False)
        if not self.mark:
            return found.ids, np.array([end for _, end in found.offsets], np.int64)
        decoder = tokenizer.get_added_tokens_decoder()
        special = {number: token.content for number, token in decoder.items() if token.special}
        ids: list[int] = []
        ends: list[int] = []
        done = 0  # characters
        for number, (begin, end) in [*zip(found.ids, found.offsets, strict=True), (None, (len(text), len(text)))]:
            if number is not None and number not in special:
                continue
            for own, stop in self._between(tokenizer, text[done:begin], special, first=done == 0):
                ids.append(own)
                ends.append(done + stop)
            if number is not None:
                ids.append(number)
                ends.append(end)
            done = end
        return ids, np.array(ends, np.int64)

    def _between(
        self, tokenizer: Tokenizer, text: str, special: Mapping[int, str], *, first: bool
    ) -> list[tuple[int, int]]:
        """The tokens of what stands between two special ones (before them all: `first`), and where each ends in it,
        marks counted.

        Where the vocabulary itself knows a spelling (Unigram and WordLevel models may), it is read letter by letter.
        """
        kept = [place for place, character in enumerate(text) if character != self.mark]
        plain = self.plain(text)
        tokenizer.encode_special_tokens = True  # as text
        try:
            found = _encoded(tokenizer, plain, 0, first)
            if any(own in special and special[own] in plain for own, _ in found):
                found = [
                    one
                    for place, letter in enumerate(plain)
                    for one in _encoded(tokenizer, letter, place, first and place == 0)
                ]
        finally:
            tokenizer.encode_special_tokens = False
        return [(own, kept[end - 1] + 1 if end else 0) for own, end in found]


def _encoded(tokenizer: Tokenizer, text: str, begin: int, first: bool) -> list[tuple[int, int]]:
    """Each token and where it ends in a text that begins at `begin`; `first`: nothing stands before it."""
    with nullcontext() if first else _going_on(tokenizer):
        found = tokenizer.encode(text, add_special_tokens=False)
    return [(own, begin + end) for own, (_, end) in zip(found.ids, found.offsets, strict=True)]


@contextmanager
def _going_on(tokenizer: Tokenizer) -> Iterator[None]:
    """Where a text goes on, a tokeniser that writes a space before the first word of all writes none."""
    steps: Any = tokenizer.pre_tokenizer
    several = isinstance(steps, pre_tokenizers.Sequence)
    spaces = [
        step
        for step in (steps if several else [steps])
        if isinstance(step, pre_tokenizers.Metaspace) and step.prepend_scheme == "first"
    ]
    for space in spaces:
        space.prepend_scheme = "never"
    try:
        yield
    finally:
        for space in spaces:
            space.prepend_scheme = "first"


def _texts(value: Any) -> list[str]:
    """Every string within a JSON value, keys too."""
    found: list[str] = []
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one
    return found


def _marked(value: Any, begins: re.Pattern[str], mark: str) -> Any:
    if isinstance(value, str):
        return begins.sub(lambda found: found[0] + mark, value)
    if isinstance(value, Mapping):
        return {_marked(key, begins, mark): _marked(one, begins, mark) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(one, begins, mark) for one in value]
    return value
