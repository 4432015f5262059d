"""What one generation call asks for, and how a gateway writes it to a replica."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from llmo.engines.generation import Grammar, Sampling

Message = Mapping[str, Any]
_DEFAULT = Sampling()


@dataclass(frozen=True, slots=True)
class Input:
    """One prompt: a conversation (with the tools it may call), a plain text, or token ids."""

    messages: Sequence[Message] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    text: str | None = None
    ids: Sequence[int] | None = None

    def size(self) -> int:
        """Roughly its bytes as text; token ids count for one each."""
        if self.ids is not None:
            return len(self.ids)
        if self.text is not None:
            return _bytes(self.text)
        return sum(_weight(value) for value in (self.messages, self.tools))


@dataclass(frozen=True, slots=True)
class Ask:
    """`n` answers for each of the inputs; answer `k` of input `i` is choice `i * n + k`.

    An answer ends before the first of the `stop` strings, or after `sampling.max_tokens` tokens (None: at the end
    of the context). `stream` asks for every piece as it comes, else each answer comes whole. `token_ids` asks for
    the tokens of prompt and answer beside the text.
    """

    inputs: Sequence[Input]
    sampling: Sampling = _DEFAULT
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    n: int = 1
    stream: bool = False
    token_ids: bool = False

    @property
    def choices(self) -> int:
        return len(self.inputs) * self.n

    def to_json(self) -> dict[str, Any]:
        """As it crosses the socket: what is as usual is left out."""
        sampling = {
            field.name: value
            for field in fields(Sampling)
            if (value := getattr(self.sampling, field.name)) != getattr(_DEFAULT, field.name)
        }
        if self.sampling.grammar is not None:
            sampling["grammar"] = [self.sampling.grammar.kind, self.sampling.grammar.text]
        if "stop_ids" in sampling:
            sampling["stop_ids"] = sorted(self.sampling.stop_ids)
        return {
            "inputs": [
                {f.name: value for f in fields(Input) if (value := getattr(one, f.name)) is not None}
                for one in self.inputs
            ],
            "sampling": sampling,
            "max_tokens": self.max_tokens,
            "stop": list(self.stop),
            "n": self.n,
            "stream": self.stream,
            "token_ids": self.token_ids,
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Ask:
        """The inverse of `to_json`; keys it does not know are ignored."""
        sampling = dict(body["sampling"])
        if "grammar" in sampling:
            sampling["grammar"] = Grammar(*sampling["grammar"])
        if "stop_ids" in sampling:
            sampling["stop_ids"] = frozenset(sampling["stop_ids"])
        return cls(
            inputs=[Input(**one) for one in body["inputs"]],
            sampling=Sampling(**sampling),
            max_tokens=body["max_tokens"],
            stop=tuple(body["stop"]),
            n=body["n"],
            stream=body["stream"],
            token_ids=body["token_ids"],
        )


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _weight(value: Any) -> int:
    """The bytes of all strings within a JSON value, and one for whatever else it holds; however deep it is."""
    total, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            total += _bytes(one)
        elif isinstance(one, Mapping):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, Sequence):
            waiting += one
        else:
            total += 1
    return total
