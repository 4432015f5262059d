"""What the routes of OpenAI's API have in common: what was asked for, and how answers of any kind are written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llmo.serve.ask import Ask
from llmo.serve.openai.errors import invalid
from llmo.serve.openai.fields import Fields

_LONGEST_MODEL = 200
_MOST_IDS = 1 << 20


class Shape(Protocol):
    """Writes one answer in the form of its route. Parts and usage are as `Part.to_json` and `Usage.to_json` say."""

    def whole(self, parts: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        """All of it, when it was not to be streamed: one part a choice."""

    def begin(self) -> list[bytes]:
        """The first events of a stream."""

    def part(self, part: Mapping[str, Any]) -> list[bytes]:
        """The events of one part."""

    def end(self, usage: Mapping[str, Any]) -> list[bytes]:
        """The last events."""

    def broken(self, body: Mapping[str, Any]) -> list[bytes]:
        """The events that end a stream with an error, which `body` describes as `errors.body_of` does."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request as it was read. `model` names an endpoint; `shape` is made once it is known which version answers."""

    model: str
    ask: Ask
    shape: Any  # (fingerprint: str) -> Shape


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer carries."""

    model: str
    fingerprint: str
    prefix: str
    id: str = field(default="")
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", new_id(self.prefix))

    def object(self, kind: str, **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            **more,
        }


def model_of(fields: Fields) -> str:
    name = fields.text("model", _LONGEST_MODEL)
    if not name:
        raise invalid(
            "'model' names an endpoint", "model", code="missing_required_parameter", hint="see GET /v1/models"
        )
    return name


def is_ids(value: Any) -> bool:
    """Whether it is a list of token ids, and not an empty one."""
    return (
        isinstance(value, list)
        and 0 < len(value) <= _MOST_IDS
        and all(type(one) is int and 0 <= one < 1 << 31 for one in value)
    )


def wants_usage(fields: Fields, stream: bool) -> bool:
    """`stream_options.include_usage`; the options are refused without a stream, as OpenAI does."""
    options = fields.object("stream_options")
    if options is None:
        return False
    if not stream:
        raise invalid("'stream_options' are for 'stream': true", "stream_options", code="invalid_value")
    return options.flag("include_usage")


def usage_of(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt_tokens": usage["prompt"],
        "completion_tokens": usage["completion"],
        "total_tokens": usage["prompt"] + usage["completion"],
        "prompt_tokens_details": {"cached_tokens": usage["cached"]},
    }


def event(body: Mapping[str, Any], name: str = "") -> bytes:
    """One server-sent event."""
    data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data) if name else b"data: %s\n\n" % data


DONE = b"data: [DONE]\n\n"


def new_id(prefix: str) -> str:
    return f"{prefix}{os.urandom(12).hex()}"
