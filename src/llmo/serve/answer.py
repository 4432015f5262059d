"""The text of one answer as it grows: tokens become characters, stop strings end it, and none of them leaks."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer, decoders
from tokenizers.decoders import DecodeStream

from llmo.engines.generation import TokenLogprob
from llmo.errors import ModelError

_LEAST = -9999.0  # what stands for a probability of zero: JSON has no infinity
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class AnswerText:
    """Feed it tokens; it returns the text that can be sent.

    Characters cut between tokens, and text that may be the beginning of a stop string, are held back until it is
    known what they become. Of several stop strings the one that is complete first counts, the longest of those; so
    the answer does not depend on how the text was cut into tokens. Tokens' log-probabilities (when `pieces` is
    given) come with the text that the tokens begin in.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), pieces: TokenPieces | None = None) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._longest = max((len(s) for s in stop), default=0)
        self._pieces = pieces
        self._decoded = 0  # characters that came out of the decoder, sent or held
        self._held = ""
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()  # where each token began, until its text is sent
        self.tokens: list[int] = []
        self.logprobs: list[dict[str, Any]] = []  # of the tokens whose text was sent; whoever sends it empties it
        self.stopped = False

    def add(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> str:
        """The text that can be sent now. Once `stopped` says so, the answer is over and what follows is ignored."""
        sent = []
        for n, token in enumerate(tokens):
            if self.stopped:
                break
            self.tokens.append(token)
            if self._pieces is not None and logprobs:
                self._waiting.append((self._decoded, logprobs[n]))
            piece = self._stream.step(self._tokenizer, token)
            if piece:
                sent.append(self._let_through(piece))
        return "".join(sent)

    def end(self) -> str:
        """The rest, when no token follows: what was held back is no stop string, and a cut character stays cut."""
        if self.stopped:
            return ""
        rest = self._tokenizer.decode(self.tokens, skip_special_tokens=True)[self._decoded :]
        sent = self._let_through(rest) if rest else ""
        if not self.stopped:
            sent += self._held
            self._held = ""
            self._release(math.inf)
        return sent

    def _let_through(self, piece: str) -> str:
        self._decoded += len(piece)
        text = self._held + piece
        found = min(
            ((at + len(s), at) for s in self._stop if (at := text.find(s)) >= 0), default=None
        )  # the first to be complete, and the longest of those
        if found is not None:
            self.stopped = True
            sent, self._held = text[: found[1]], ""
            self._release(self._decoded - len(text) + len(sent))
            self._waiting.clear()
            return sent
        keep = self._beginning(text)
        sent, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self._release(self._decoded - keep)
        return sent

    def _beginning(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            if any(s.startswith(tail) for s in self._stop):
                return size
        return 0

    def _release(self, before: float) -> None:
        while self._pieces is not None and self._waiting and self._waiting[0][0] < before:
            self.logprobs.append(self._pieces.spelled(self._waiting.popleft()[1]))


class TokenPieces:
    """The bytes of single tokens, which may be parts of a character, and log-probabilities spelled with them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes = _byte_alphabet() if isinstance(tokenizer.decoder, decoders.ByteLevel) else None
        self._known: dict[int, bytes] = {}

    def bytes_of(self, token: int) -> bytes:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._look_up(token)
        return found

    def longest(self) -> int:
        """Bytes of the longest token in the vocabulary: no text has fewer tokens than its bytes divided by this."""
        return max((len(text.encode()) for text in self._tokenizer.get_vocab()), default=1)

    def spelled(self, one: TokenLogprob) -> dict[str, Any]:
        """`{"token", "logprob", "bytes", "top_logprobs"}`, as OpenAI writes them. Raises ModelError for NaN."""
        return {
            **self._spelled(one.token, one.logprob),
            "top_logprobs": [self._spelled(token, logprob) for token, logprob in one.top],
        }

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        if math.isnan(logprob):
            raise ModelError(
                "the model's answer is not a finite number", hint="its weights are damaged: run `llmo verify` on it"
            )
        data = self.bytes_of(token)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": max(float(logprob), _LEAST), "bytes": list(data)}

    def _look_up(self, token: int) -> bytes:
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        if self._bytes is not None:
            if all(letter in self._bytes for letter in text):
                return bytes(self._bytes[letter] for letter in text)
            return str(text).encode()
        byte = _BYTE.fullmatch(text)
        return bytes.fromhex(byte[1]) if byte else str(text).replace("▁", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """How byte-level tokenisers (GPT-2's and all after it) write bytes as letters that can be seen."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
