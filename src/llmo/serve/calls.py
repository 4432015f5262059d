"""The nouns of a replica that generates: a call, its choices as the engine knows them, and what a call is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmo.errors import LLMOError
from llmo.serve.answer import AnswerText
from llmo.serve.ask import Ask


@dataclass(frozen=True, slots=True)
class Part:
    """What was added to one choice. The last one has `finish`: "stop" or "length"."""

    choice: int
    text: str
    finish: str | None = None
    logprobs: Sequence[Mapping[str, Any]] | None = None
    token_ids: Sequence[int] | None = None

    def to_json(self) -> dict[str, Any]:
        """As it crosses the socket: what is not there is left out."""
        body: dict[str, Any] = {"choice": self.choice, "text": self.text}
        if self.finish is not None:
            body["finish"] = self.finish
        if self.logprobs is not None:
            body["logprobs"] = self.logprobs
        if self.token_ids is not None:
            body["token_ids"] = self.token_ids
        return body


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole call: each input counted once; `cached` were not computed. The last thing a call hears."""

    prompt: int
    completion: int
    cached: int
    prompt_ids: Sequence[Sequence[int]] | None = None

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {"prompt": self.prompt, "completion": self.completion, "cached": self.cached}
        if self.prompt_ids is not None:
            body["prompt_ids"] = self.prompt_ids
        return body


Heard = Sequence[Part] | Usage | LLMOError


@dataclass(eq=False, slots=True)
class Call:
    """One call. `hear` is told parts, then once the usage or an error; in the thread that knows it.

    By `deadline` (unix seconds) the answer must have begun; a `strict` one must be complete by then.
    """

    ask: Ask
    hear: Callable[[Heard], None]
    deadline: float = float("inf")
    strict: bool = False
    tenant: str = ""
    adapter: str | None = None
    over: bool = False
    begun: bool = False
    arrived: float = 0.0
    places: int = 0  # its choices that wait
    tokens: int = 0  # what they count in the queue
    left: int = 0  # its choices that are not complete
    prompts: Sequence[Sequence[int]] = ()
    streams: list[Stream] = field(default_factory=list)
    completion: int = 0
    cached: int = 0

    def usage(self) -> Usage:
        prompt_ids = self.prompts if self.ask.token_ids else None
        return Usage(sum(len(ids) for ids in self.prompts), self.completion, self.cached, prompt_ids)


@dataclass(eq=False, slots=True)
class Stream:
    """One choice of a call, as the engine knows it by `id`."""

    id: int
    call: Call
    choice: int
    ids: Sequence[int]
    text: AnswerText
    over: bool = False
    begun: bool = False
    held: list[str] = field(default_factory=list)  # text of a call that wants its answer whole
