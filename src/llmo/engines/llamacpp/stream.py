"""One prompt on its way through the engine, and the part of it that one call computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from llmo.engines.llamacpp.chooser import Chooser
from llmo.engines.llamacpp.prefixes import Held, Ids


@dataclass(slots=True)
class Stream:
    """One prompt on its way. `computed` of its tokens are in the cache, in the stream `number` of it."""

    id: int
    tenant: str
    prompt: Ids
    limit: int  # tokens of answer
    chooser: Chooser
    ends: frozenset[int]
    number: int = -1
    computed: int = 0
    cached: int = 0
    answer: list[int] = field(default_factory=list)

    @property
    def prompted(self) -> bool:
        """The whole prompt is in the cache, so it is the answer that grows."""
        return self.computed >= len(self.prompt)

    @property
    def need(self) -> int:
        return len(self.prompt) + self.limit

    def held(self) -> Held:
        tokens = np.concatenate([self.prompt, np.asarray(self.answer, np.int32)])[: self.computed]
        return Held(self.number, self.tenant, tokens)


@dataclass(slots=True)
class Part:
    """What one call computes of one stream; `last` is the place of its last token in the call."""

    stream: Stream
    tokens: Sequence[int] | Ids
    last: int = 0
