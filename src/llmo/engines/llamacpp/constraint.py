"""Holds an answer to a JSON schema or a regular expression: which tokens may come next.

llama.cpp has grammars of its own but no regular expressions; llguidance has both, for the same tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmo.engines.folder import require
from llmo.engines.generation import Grammar
from llmo.errors import InputError, ModelError, needing

MOST = 100_000  # characters; a grammar of a million takes seconds a token


class Grammars:
    """Compiles grammars for one model folder's tokeniser, which is read (about a second) when the first one comes."""

    def __init__(self, folder: Path, vocabulary: int, end_ids: frozenset[int]) -> None:
        self._folder = folder
        self._vocabulary = vocabulary
        self._end_ids = end_ids
        self._tokenizer: Any = None

    def compile(self, grammar: Grammar) -> Constraint:
        """Raises InputError for a schema or an expression that cannot be followed."""
        with needing("a constrained answer", "generate"):
            import llguidance
        if len(grammar.text) > MOST:
            raise _unusable(grammar, f"it has {len(grammar.text)} characters, {MOST} are the most")
        if self._tokenizer is None:
            self._tokenizer = self._read(llguidance)
        try:
            if grammar.kind == "json_schema":
                source = llguidance.LLMatcher.grammar_from_json_schema(grammar.text)
            else:
                source = llguidance.LLMatcher.grammar_from_regex(grammar.text)
        except ValueError as error:
            raise _unusable(grammar, str(error)) from error
        matcher = llguidance.LLMatcher(self._tokenizer, source, log_level=0)
        if matcher.is_error():
            raise _unusable(grammar, matcher.get_error())
        return Constraint(matcher, self._vocabulary)

    def _read(self, llguidance: Any) -> Any:
        path = require(self._folder, "tokenizer.json")
        if not self._end_ids:
            raise ModelError("the model names no end token, which a constrained answer needs", where=str(self._folder))
        try:
            text = path.read_text(encoding="utf-8")
            return llguidance.LLTokenizer(text, n_vocab=self._vocabulary, eos_token=sorted(self._end_ids))
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"constrained answers cannot use this tokeniser: {error}", where=str(path)) from error


class Constraint:
    """The state of one answer: `mask` before each token, `accept` after it."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._words = np.zeros((vocabulary + 31) // 32, np.int32)

    @property
    def complete(self) -> bool:
        return bool(self._matcher.is_stopped())

    def mask(self, scores: NDArray[np.float32], end_ids: frozenset[int]) -> None:
        """Put what may not come next to minus infinity. Raises InputError when nothing may."""
        words = self._words
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():
            raise InputError(f"the grammar cannot be followed further: {_first_line(self._matcher.get_error())}")
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(scores)].astype(bool)
        if self._matcher.is_accepting():
            allowed[list(end_ids)] = True
        if not allowed.any():
            raise InputError("the grammar allows no token here", hint="the vocabulary cannot spell what it asks for")
        scores[~allowed] = -np.inf

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)


def _unusable(grammar: Grammar, why: str) -> InputError:
    what = "JSON schema" if grammar.kind == "json_schema" else "regular expression"
    return InputError(f"the {what} cannot be used: {_first_line(why)}")


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0][:200]
