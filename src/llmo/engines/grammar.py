"""Holds an answer to a JSON schema or a regular expression by saying which tokens may come next (llguidance, MIT)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from llmo.engines.folder import require
from llmo.engines.generation import Grammar
from llmo.errors import InputError, ModelError

MAX_BYTES = 64 << 10  # a schema with more properties compiles for seconds
LIMITS = llguidance.LLParserLimits(initial_lexer_fuel=1_000_000, step_lexer_fuel=200_000, max_grammar_size=100_000)
# Whitespace as it likes would let a model write spaces without end.
SPACING: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Constraint:
    """What one answer may still become. Ask for the `mask`, choose, then `accept` the token."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def mask(self) -> NDArray[np.bool_]:
        """`[vocabulary]`: the tokens that may come next; an end token is among them where the answer is whole.

        Raises InputError when the grammar costs more than its limits.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        _check(self._matcher)
        allowed = np.unpackbits(bits, bitorder="little").view(np.bool_)
        if allowed.size >= self._vocabulary:
            return allowed[: self._vocabulary]
        return np.pad(allowed, (0, self._vocabulary - allowed.size))

    def accept(self, token: int) -> None:
        """Raises InputError for a token that the mask did not allow."""
        self._matcher.consume_token(token)
        _check(self._matcher)

    @property
    def complete(self) -> bool:
        """Whether nothing but an end token may follow."""
        return bool(self._matcher.is_stopped())


class Grammars:
    """Compiles grammars for one model's tokens. `ends` are the ids that may end an answer."""

    def __init__(self, folder: Path, vocabulary: int, ends: Sequence[int]) -> None:
        path = require(folder, "tokenizer.json")
        try:
            self._tokens = llguidance.LLTokenizer(path.read_text(encoding="utf-8"), eos_token=list(ends))
        except Exception as error:  # the Rust library raises whatever it likes for a tokeniser it does not know
            raise ModelError(
                f"grammars cannot use this tokeniser: {str(error).splitlines()[0][:200]}",
                hint="ask without response_format",
                where=str(path),
            ) from error
        self._vocabulary = vocabulary

    def compile(self, grammar: Grammar) -> Constraint:
        """Raises InputError for a grammar that is wrong, allows nothing, or costs too much."""
        size = len(grammar.text.encode("utf-8", "surrogatepass"))
        if size > MAX_BYTES:
            raise InputError(f"the grammar has {size} bytes, the limit is {MAX_BYTES}", hint="make it smaller")
        try:
            if grammar.kind == "json_schema":
                text = llguidance.LLMatcher.grammar_from_json_schema(grammar.text, overrides=SPACING)
            else:
                text = llguidance.LLMatcher.grammar_from_regex(grammar.text)
            matcher = llguidance.LLMatcher(self._tokens, text, log_level=0, limits=LIMITS)
        except (ValueError, UnicodeError) as error:
            raise InputError(f"the grammar cannot be read: {str(error)[:200]}", hint="check its JSON") from error
        _check(matcher)
        constraint = Constraint(matcher, self._vocabulary)
        if not constraint.mask().any():
            raise InputError("the grammar allows no answer at all", hint="check what it requires")
        return constraint


def _check(matcher: llguidance.LLMatcher) -> None:
    if matcher.is_error():
        reason = str(matcher.get_error()).split("<backtrace>", maxsplit=1)[0].split("<state>", maxsplit=1)[0].strip()
        raise InputError(
            f"the grammar cannot be followed: {reason[:300]}",
            hint="give a smaller schema, or a regular expression without look-around",
        )
