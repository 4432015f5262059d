"""The bounded queue of a replica that generates: places and tokens, and a share of them kept for newcomers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llmo.errors import BusyError
from llmo.serve.calls import Call, Stream
from llmo.serve.line import FairLine

_TOKENS_A_PLACE = 1024
_SHORTEST_WAIT = 0.05  # seconds a refused client is told to stay away at least


class PromptQueue:
    """`places` bounds the choices that wait, and together their prompts hold at most 1024 tokens a place.

    The last eighth of the places is for tenants that have nothing in it. First a call waits for its prompts to be
    made (`take_call`, then `stand`), then each choice for the engine (`peek`, `take`); tenants take turns in both.
    Not thread-safe: whoever owns it holds a lock. `seconds_for` estimates how long so many prompts take.
    """

    def __init__(self, places: int, seconds_for: Callable[[int], float]) -> None:
        self.places = places
        self.least_tokens = 0  # what it takes in any case, however few its places: one whole prompt
        self.tokens = 0
        self._seconds_for = seconds_for
        self._held: dict[str, int] = {}
        self._unmade: FairLine[Call] = FairLine()
        self._line: FairLine[Stream] = FairLine()

    def __len__(self) -> int:
        """Choices that wait, whether their prompt is made or not."""
        return sum(self._held.values())

    @property
    def unmade(self) -> bool:
        return bool(self._unmade)

    @property
    def ready(self) -> bool:
        return bool(self._line)

    def add(self, call: Call, tokens: int) -> None:
        """Let a call in with an estimate of its tokens. Raises BusyError when there is no room."""
        choices, waiting = call.ask.choices, len(self)
        places = self.places - self.places // 8 if call.tenant in self._held else self.places
        most = max(self.places * _TOKENS_A_PLACE, self.least_tokens)
        if waiting + choices > places or (self.tokens and self.tokens + tokens > most):
            wait = max(_SHORTEST_WAIT, self._seconds_for(max(1, waiting // 2)))
            raise BusyError(
                f"the queue is full ({waiting} prompts of about {self.tokens} tokens wait)",
                hint=f"send it again in {wait:.1f} s",
                retry_after=round(wait, 3),
            )
        self._held[call.tenant] = self._held.get(call.tenant, 0) + choices
        self.tokens += tokens
        call.places, call.tokens = choices, tokens
        self._unmade.add(call.tenant, call)

    def take_call(self) -> Call:
        """The next call whose prompts are to be made; it keeps its places. Raises KeyError when there is none."""
        return self._unmade.take()

    def wait_again(self, call: Call) -> None:
        """What `take_call` gave cannot be made yet: it comes last of its tenant's."""
        self._unmade.add(call.tenant, call)

    def stand(self, call: Call, streams: Sequence[Stream]) -> None:
        """The call's prompts are made: its choices wait for the engine, and their tokens are known."""
        tokens = sum(len(stream.ids) for stream in streams)
        self.tokens += tokens - call.tokens
        call.tokens = tokens
        call.streams[:] = streams
        for stream in streams:
            self._line.add(call.tenant, stream)

    def peek(self) -> Stream | None:
        return self._line.peek()

    def take(self) -> Stream:
        """The next choice, which waits no longer."""
        stream = self._line.take()
        self._give_back(stream.call, 1, len(stream.ids))
        return stream

    def drop(self, call: Call) -> list[Stream]:
        """Take a call out altogether; returns those of its choices that did not wait any more."""
        self._unmade.remove(call.tenant, call)
        self._give_back(call, call.places, call.tokens)
        return [stream for stream in call.streams if not self._line.remove(call.tenant, stream)]

    def _give_back(self, call: Call, places: int, tokens: int) -> None:
        if places == 0:
            return
        call.places -= places
        call.tokens -= tokens
        self.tokens -= tokens
        self._held[call.tenant] -= places
        if self._held[call.tenant] == 0:
            del self._held[call.tenant]
