"""POST /v1/responses, as far as creating and streaming one goes: reads the request, writes the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

from llmo.engines.generation import Grammar
from llmo.serve.ask import Ask, Input
from llmo.serve.openai import grammar
from llmo.serve.openai.errors import invalid
from llmo.serve.openai.fields import Fields, kind, read
from llmo.serve.openai.messages import MOST_MESSAGES, message
from llmo.serve.openai.request import Head, Wanted, event, model_of, new_id
from llmo.serve.openai.sampling import max_tokens_of, sampling_of, stop_of
from llmo.serve.openai.tools import ToolCall, ToolReader, Tools, tools_of

EXAMPLE = 'send {"model": "ENDPOINT", "input": "..."}'
_LONGEST_INPUT = 8 << 20
_UNSUPPORTED: dict[str, Sequence[Any]] = {
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
}


def parse(data: bytes) -> Wanted:
    """The request. Raises InputError that says what is wrong with it and where."""
    fields = read(data, EXAMPLE)
    model = model_of(fields)
    messages = _messages(fields)
    fields.refuse(_UNSUPPORTED)
    tools = tools_of(fields)
    form = _form(fields)
    ask = Ask(
        inputs=[Input(messages=messages, tools=tools.declared)],
        sampling=sampling_of(fields, tools.forced or form, None),
        max_tokens=max_tokens_of(fields, "max_output_tokens"),
        stop=stop_of(fields),
        stream=fields.flag("stream"),
    )
    callable_ = tools if tools.forced or form is None else Tools()
    return Wanted(model, ask, partial(ResponseShape, model, ask, callable_, _echoed(fields)))


def _messages(fields: Fields) -> list[dict[str, Any]]:
    """`instructions` and `input` as one conversation."""
    instructions = fields.text("instructions", _LONGEST_INPUT)
    found = [message({"role": "system", "content": instructions}, "instructions")] if instructions else []
    value = fields.get("input")
    if isinstance(value, str):
        return [*found, message({"role": "user", "content": value}, "input")]
    items = fields.items("input", MOST_MESSAGES)
    if not items:
        raise invalid("'input' is a text or a list of items", "input", code="missing_required_parameter")
    return [*found, *(_item(item, f"input[{index}]") for index, item in enumerate(items))]


def _item(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise invalid(f"an item is an object, not {kind(item)}", where, code="invalid_type")
    match item.get("type", "message"):
        case "message":
            return message({"role": item.get("role"), "content": item.get("content")}, where)
        case "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "function": function}
            return message({"role": "assistant", "tool_calls": [call]}, where)
        case "function_call_output":
            answered = {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
            return message(answered, where)
        case _:
            raise invalid("this model reads messages and function calls only", f"{where}.type", code="invalid_value")


def _form(fields: Fields) -> Grammar | None:
    text = fields.object("text")
    wanted = text.object("format") if text is not None else None
    return None if wanted is None else grammar.of_format(wanted, wanted)


def _echoed(fields: Fields) -> dict[str, Any]:
    """What a response repeats of its request."""
    return {
        "instructions": fields.get("instructions"),
        "max_output_tokens": fields.get("max_output_tokens"),
        "metadata": fields.get("metadata") or {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "temperature": fields.number("temperature", 0.0, 2.0, 1.0),
        "tool_choice": fields.get("tool_choice") or "auto",
        "tools": fields.get("tools") or [],
        "top_p": fields.number("top_p", 0.0, 1.0, 1.0),
    }


class ResponseShape:
    """A response, whole or as the events of its making: items of output, a message or calls of functions."""

    def __init__(self, model: str, ask: Ask, tools: Tools, echoed: Mapping[str, Any], fingerprint: str) -> None:
        head = Head(model, fingerprint, "resp_")
        self._base = {"id": head.id, "object": "response", "created_at": head.created, "model": model, **echoed}
        self._reader = ToolReader(tools.names) if tools.names else None
        self._numbers = count()
        self._output: list[dict[str, Any]] = []  # the items that are complete
        self._message: dict[str, Any] | None = None  # the one being written
        self._finish = "stop"

    def whole(self, parts: Sequence[Mapping[str, Any]], usage: Mapping[str, Any]) -> dict[str, Any]:
        for part in parts:
            self.part(part)
        return self._ended(usage)

    def begin(self) -> list[bytes]:
        body = {**self._base, "status": "in_progress", "output": [], "error": None, "incomplete_details": None}
        return [self._event("response.created", response=body), self._event("response.in_progress", response=body)]

    def part(self, part: Mapping[str, Any]) -> list[bytes]:
        events: list[bytes] = []
        found: list[str | ToolCall] = [part["text"]]
        if self._reader is not None:
            found = self._reader.add(part["text"]) + (self._reader.end() if "finish" in part else [])
        for one in found:
            if isinstance(one, ToolCall):
                events += self._close() + self._called(one)
            elif one:
                events += self._wrote(one)
        if "finish" in part:
            self._finish = part["finish"]
            if not self._output and self._message is None:
                events += self._open()
            events += self._close()
        return events

    def end(self, usage: Mapping[str, Any]) -> list[bytes]:
        body = self._ended(usage)
        return [self._event(f"response.{body['status']}", response=body)]

    def broken(self, body: Mapping[str, Any]) -> list[bytes]:
        error = body["error"]
        return [self._event("error", code=error["code"], message=error["message"], param=error["param"])]

    def _ended(self, usage: Mapping[str, Any]) -> dict[str, Any]:
        cut = self._finish == "length"
        return {
            **self._base,
            "status": "incomplete" if cut else "completed",
            "output": self._output,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage["prompt"],
                "input_tokens_details": {"cached_tokens": usage["cached"], "cache_write_tokens": 0},
                "output_tokens": usage["completion"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["prompt"] + usage["completion"],
            },
        }

    # A message is opened by its first text, and closed by its end or by a call.

    def _open(self) -> list[bytes]:
        self._message = {
            "id": new_id("msg_"),
            "type": "message",
            "role": "assistant",
            "status": "in_progress",
            "content": [],
        }
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        events = [self._event("response.output_item.added", **self._at(), item=dict(self._message))]
        self._message["content"] = [part]
        return [*events, self._event("response.content_part.added", **self._in(), part=part)]

    def _wrote(self, text: str) -> list[bytes]:
        events = self._open() if self._message is None else []
        if self._message is not None:
            self._message["content"][0]["text"] += text
        return [*events, self._event("response.output_text.delta", **self._in(), delta=text, logprobs=[])]

    def _close(self) -> list[bytes]:
        if self._message is None:
            return []
        part = self._message["content"][0]
        self._message["status"] = "incomplete" if self._finish == "length" else "completed"
        events = [
            self._event("response.output_text.done", **self._in(), text=part["text"], logprobs=[]),
            self._event("response.content_part.done", **self._in(), part=part),
            self._event("response.output_item.done", **self._at(), item=self._message),
        ]
        self._output.append(self._message)
        self._message = None
        return events

    def _called(self, call: ToolCall) -> list[bytes]:
        item = {
            "id": new_id("fc_"),
            "type": "function_call",
            "call_id": new_id("call_"),
            "name": call.name,
            "arguments": call.arguments,
            "status": "completed",
        }
        opened = {**item, "arguments": "", "status": "in_progress"}
        where = {**self._at(), "item_id": item["id"]}
        events = [
            self._event("response.output_item.added", **self._at(), item=opened),
            self._event("response.function_call_arguments.delta", **where, delta=call.arguments),
            self._event("response.function_call_arguments.done", **where, name=call.name, arguments=call.arguments),
            self._event("response.output_item.done", **self._at(), item=item),
        ]
        self._output.append(item)
        return events

    def _at(self) -> dict[str, Any]:
        return {"output_index": len(self._output)}

    def _in(self) -> dict[str, Any]:
        id = self._message["id"] if self._message is not None else ""
        return {**self._at(), "content_index": 0, "item_id": id}

    def _event(self, type: str, **body: Any) -> bytes:
        return event({"type": type, "sequence_number": next(self._numbers), **body}, type)
