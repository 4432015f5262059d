"""One prompt and its answer on their way: tokens, the blocks that hold their keys and values, and its sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llmo.engines.generation import Prompt
from llmo.engines.grammar import Constraint
from llmo.engines.paged.blocks import BLOCK, chain
from llmo.engines.paged.lookup import Lookup
from llmo.engines.sampling import Sampler


@dataclass(slots=True, eq=False)
class Stream:
    """`ids` is the prompt and the answer so far; the first `done` of them have keys and values in `blocks`."""

    prompt: Prompt
    sampler: Sampler
    ids: list[int]
    asked: int  # tokens of the prompt
    key: bytes  # where the chain of its blocks' keys begins
    constraint: Constraint | None = None
    adapter: str | None = None
    lookup: Lookup | None = None
    block: int = BLOCK  # tokens
    blocks: list[int] = field(default_factory=list)
    done: int = 0
    cached: int = 0
    keys: list[bytes] = field(default_factory=list)

    @property
    def pending(self) -> int:
        return len(self.ids) - self.done

    @property
    def plain(self) -> bool:
        """Whether its token depends on its logits, its settings and chance alone, and is all that it wants to know."""
        return not self.sampler.adjusts and self.constraint is None and self.prompt.sampling.logprobs is None

    @property
    def decoding(self) -> bool:
        return self.pending == 1 and self.done >= self.asked

    def key_of(self, index: int) -> bytes:
        """The key of its full block `index`."""
        while len(self.keys) <= index:
            start = len(self.keys) * self.block
            self.keys.append(chain(self.keys[-1] if self.keys else self.key, self.ids[start : start + self.block]))
        return self.keys[index]


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens of one stream that one step computes: `ids[start : start + count]`, prompt or answer, never both; or
    one token that is only guessed, and of use if the stream's ids become what the guesses up to it say."""

    stream: Stream
    start: int
    count: int
    guess: int | None = None

    @property
    def tokens(self) -> Sequence[int]:
        return self.stream.ids[self.start : self.start + self.count] if self.guess is None else (self.guess,)

    @property
    def of_prompt(self) -> bool:
        return self.start < self.stream.asked

    @property
    def last(self) -> bool:
        """Whether the next token follows from it."""
        return self.guess is not None or self.start + self.count == len(self.stream.ids)
