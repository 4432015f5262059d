"""POST /v1/chat/completions: reads the request, writes the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from llmo.serve.ask import Ask, Input
from llmo.serve.openai import grammar
from llmo.serve.openai.errors import invalid
from llmo.serve.openai.fields import Fields, read
from llmo.serve.openai.messages import messages_of
from llmo.serve.openai.request import DONE, Head, Wanted, event, model_of, new_id, usage_of, wants_usage
from llmo.serve.openai.sampling import choices_of, max_tokens_of, sampling_of, stop_of
from llmo.serve.openai.tools import ToolCall, ToolReader, Tools, tools_of

EXAMPLE = 'send {"model": "ENDPOINT", "messages": [{"role": "user", "content": "..."}]}'
_MOST_LOGPROBS = 20
# What would change the answer and cannot be heeded. Other unknown fields are ignored, as OpenAI's clients expect.
_UNSUPPORTED: dict[str, Sequence[Any]] = {
    "logit_bias": ({},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
}


def parse(data: bytes) -> Wanted:
    """The request. Raises InputError that says what is wrong with it and where."""
    fields = read(data, EXAMPLE)
    model = model_of(fields)
    messages = messages_of(fields)
    fields.refuse(_UNSUPPORTED)
    tools = tools_of(fields)
    format_ = grammar.wanted(fields)
    stream = fields.flag("stream")
    include_usage = wants_usage(fields, stream)
    ask = Ask(
        inputs=[Input(messages=messages, tools=tools.declared)],
        sampling=sampling_of(fields, tools.forced or format_, _logprobs(fields)),
        max_tokens=max_tokens_of(fields, "max_completion_tokens", "max_tokens"),
        stop=stop_of(fields),
        n=choices_of(fields),
        stream=stream,
        token_ids=fields.flag("return_token_ids"),
    )
    # A form that was asked for leaves no room for calls, unless the call itself is what is forced.
    callable_ = tools if tools.forced or format_ is None else Tools()
    return Wanted(model, ask, partial(ChatShape, model, ask, callable_, include_usage))


def _logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", 0, _MOST_LOGPROBS)
    if fields.flag("logprobs"):
        return top or 0
    if top:
        raise invalid("'top_logprobs' needs 'logprobs': true", "top_logprobs", code="invalid_value")
    return None


class ChatShape:
    """A chat completion, whole or in chunks."""

    def __init__(self, model: str, ask: Ask, tools: Tools, include_usage: bool, fingerprint: str) -> None:
        self._head = Head(model, fingerprint, "chatcmpl-")
        self._include_usage = include_usage
        self._logprobs = ask.sampling.logprobs is not None
        self._readers = [ToolReader(tools.names) if tools.names else None for _ in range(ask.choices)]
        self._calls = [0] * ask.choices
        self._begun: set[int] = set()

    def whole(self, parts: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        choices = [self._choice(part) for part in sorted(parts, key=lambda part: int(part["choice"]))]
        body = self._head.object("chat.completion", choices=choices, usage=usage_of(usage))
        if "prompt_ids" in usage:
            body["prompt_token_ids"] = usage["prompt_ids"][0]
        return body

    def begin(self) -> list[bytes]:
        return []

    def part(self, part: Mapping[str, Any]) -> list[bytes]:
        index = part["choice"]
        events = []
        if index not in self._begun:
            self._begun.add(index)
            events.append(self._chunk(index, {"role": "assistant", "content": "", "refusal": None}))
        texts, calls = self._read(part)
        deltas: list[dict[str, Any]] = [{"content": "".join(texts)}] if texts else []
        deltas += [{"tool_calls": [self._called(index, call, numbered=True)]} for call in calls]
        logprobs = self._logprobs_of(part)
        if not deltas and logprobs and logprobs["content"]:
            deltas.append({"content": ""})
        for number, delta in enumerate(deltas):
            events.append(self._chunk(index, delta, logprobs=logprobs if number == 0 else None))
        if "finish" in part:
            more = {"token_ids": part["token_ids"]} if "token_ids" in part else {}
            events.append(self._chunk(index, {}, finish=self._finish(part), **more))
        return events

    def end(self, usage: Mapping[str, Any]) -> list[bytes]:
        if not self._include_usage:
            return [DONE]
        return [event(self._head.object("chat.completion.chunk", choices=[], usage=usage_of(usage))), DONE]

    def broken(self, body: Mapping[str, Any]) -> list[bytes]:
        return [event(body)]

    def _choice(self, part: Mapping[str, Any]) -> dict[str, Any]:
        texts, calls = self._read(part)
        content = "".join(texts)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not calls else None,
            "refusal": None,
        }
        if calls:
            message["tool_calls"] = [self._called(part["choice"], call) for call in calls]
        choice = {
            "index": part["choice"],
            "message": message,
            "logprobs": self._logprobs_of(part),
            "finish_reason": self._finish(part),
        }
        if "token_ids" in part:
            choice["token_ids"] = part["token_ids"]
        return choice

    def _read(self, part: Mapping[str, Any]) -> tuple[list[str], list[ToolCall]]:
        reader = self._readers[part["choice"]]
        if reader is None:
            return ([part["text"]] if part["text"] else []), []
        found = reader.add(part["text"]) + (reader.end() if "finish" in part else [])
        return [one for one in found if isinstance(one, str)], [one for one in found if isinstance(one, ToolCall)]

    def _called(self, index: int, call: ToolCall, *, numbered: bool = False) -> dict[str, Any]:
        number = self._calls[index]
        self._calls[index] += 1
        body = {
            "id": new_id("call_"),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        return {"index": number, **body} if numbered else body

    def _finish(self, part: Mapping[str, Any]) -> str:
        return "tool_calls" if self._calls[part["choice"]] else str(part["finish"])

    def _logprobs_of(self, part: Mapping[str, Any]) -> dict[str, Any] | None:
        return {"content": part.get("logprobs", []), "refusal": None} if self._logprobs else None

    def _chunk(
        self,
        index: int,
        delta: Mapping[str, Any],
        *,
        finish: str | None = None,
        logprobs: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish, **more}
        usage = {"usage": None} if self._include_usage else {}
        return event(self._head.object("chat.completion.chunk", choices=[choice], **usage))
