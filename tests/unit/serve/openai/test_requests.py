"""Requests of all kinds become one Ask, and errors have OpenAI's shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmo.engines.generation import Grammar, Sampling
from llmo.errors import BusyError, DeadlineError, InputError, LLMOError, NotFoundError, UnreachableError
from llmo.serve.ask import Ask, Input
from llmo.serve.openai import chat, completions, responses
from llmo.serve.openai.errors import body_of, headers_of, status_of
from llmo.serve.openai.messages import message

HI = [{"role": "user", "content": "hi"}]

DEEP = '{"a": ' + "[" * 800 + "]" * 800 + "}"  # what walks it by recursion would fail


def asked(parse: Any, **body: Any) -> Ask:
    ask: Ask = parse(json.dumps({"model": "m", **body}).encode()).ask
    return ask


def test_a_chat_request_in_full() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ask = asked(
        chat.parse,
        messages=[{"role": "developer", "content": parts}, *HI],
        max_tokens=5, max_completion_tokens=7, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, seed=-1, n=2,
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.1, stop=["x", "y"], logprobs=True,
        top_logprobs=3, regex="a|b", stream=True,
    )  # fmt: skip
    assert ask.inputs[0].messages == [{"role": "system", "content": "a\nb"}, {"role": "user", "content": "hi"}]
    assert ask.sampling == Sampling(
        temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, repetition_penalty=1.1, presence_penalty=1.0,
        frequency_penalty=-1.0, seed=(1 << 63) - 1, logprobs=3, grammar=Grammar("regex", "a|b"),
    )  # fmt: skip
    assert (ask.max_tokens, ask.stop, ask.n, ask.stream) == (7, ("x", "y"), 2, True)
    assert Ask.from_json(json.loads(json.dumps(ask.to_json()))).to_json() == ask.to_json()


def test_what_is_left_out_is_as_usual() -> None:
    ask = asked(chat.parse, messages=HI, temperature=None, stop=None, tools=None, top_k=-1)
    assert ask == Ask([Input(messages=HI)])
    assert asked(completions.parse, prompt="a").max_tokens == 16


def test_calls_and_what_they_returned_are_given_as_templates_take_them() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    conversation = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    conversation.append({"role": "tool", "tool_call_id": "c1", "content": ""})
    found = asked(chat.parse, messages=conversation).inputs[0].messages
    assert found is not None
    assert found[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": ""},
    ]
    assert asked(responses.parse, input=items).inputs[0].messages == found
    spoken = asked(responses.parse, input="hi", instructions="be nice").inputs[0].messages
    assert spoken == [{"role": "system", "content": "be nice"}, *HI]


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"role": "assistant", "content": None}, "m.content"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "arguments"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]}, "arguments"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}, "arguments"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "name"),
        ({"role": "assistant", "tool_calls": [{}]}, "function"),
        ({"role": "tool", "content": "x"}, "tool_call_id"),
        ({"role": "tool", "tool_call_id": "c"}, "content"),
        ({"role": "system", "content": " \n"}, "content"),
        ({"role": ["user"], "content": "x"}, "role"),
        ({"role": "user", "content": [{"type": "text"}]}, "content[0].text"),
        ({"role": "user", "content": ["x"]}, "content[0]"),
        ({"role": "user", "content": "x", "name": 5}, "name"),
    ],
)
def test_what_is_wrong_with_a_message_is_named(value: Any, param: str) -> None:
    with pytest.raises(InputError) as caught:
        message(value, "m")
    assert caught.value.where.endswith(param)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": []},
        {"prompt": ""},
        {"prompt": [1, "a"]},
        {"prompt": [[]]},
        {"prompt": [True]},
        {"prompt": ["a"] * 65},
        {"prompt": 5},
        {"prompt": "a", "best_of": 3},
        {"prompt": "a", "echo": True},
        {"prompt": "a", "logprobs": 6},
        {"prompt": "a", "top_p": 0},
        {"prompt": "a", "repetition_penalty": 0},
        {"prompt": "a", "seed": 1 << 63},
        {"prompt": "a", "stop": [""]},
        {"prompt": "a", "stop": [1]},
        {"prompt": "a", "stop": 1},
        {"prompt": "a", "stream": "yes"},
        {"prompt": "a", "model": ""},
        {"prompt": "a", "model": None},
    ],
)
def test_what_is_wrong_with_a_completion_is_named(body: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        asked(completions.parse, **body)
    assert caught.value.where in body


def test_responses_that_need_a_memory_are_refused() -> None:
    for body in ({"previous_response_id": "r"}, {"background": True}, {"input": []}, {"input": [{"type": "image"}]}):
        with pytest.raises(InputError):
            asked(responses.parse, **{"input": "hi", **body})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from([
    "messages", "prompt", "input", "stop", "tools", "tool_choice", "response_format", "temperature", "n", "seed",
    "max_tokens", "logprobs", "top_logprobs", "stream", "stream_options", "regex", "text", "instructions", "model",
])  # fmt: skip


@given(st.dictionaries(FIELDS, JSON, max_size=4), st.sampled_from([chat.parse, completions.parse, responses.parse]))
def test_whatever_a_body_holds_it_is_read_or_refused_with_a_reason(body: dict[str, Any], parse: Any) -> None:
    data = json.dumps({"model": "m", "messages": HI, "prompt": "a", "input": "a", **body}).encode()
    try:
        ask: Ask = parse(data).ask
    except InputError as error:
        refused = error
    else:
        assert Ask.from_json(json.loads(json.dumps(ask.to_json()))).to_json() == ask.to_json()
        return
    assert refused.what
    assert status_of(refused) == 400


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (InputError("x", where="n", code="invalid_type"), 400, "invalid_request_error", "invalid_type"),
        (InputError("x"), 400, "invalid_request_error", None),
        (NotFoundError("x"), 404, "invalid_request_error", "model_not_found"),
        (BusyError("x", retry_after=1.2), 429, "requests", "rate_limit_exceeded"),
        (DeadlineError("x"), 504, "server_error", "deadline"),
        (UnreachableError("x"), 503, "server_error", "unreachable"),
        (LLMOError("x"), 500, "server_error", "error"),
    ],
)
def test_errors_have_openais_shape(error: LLMOError, status: int, kind: str, code: str | None) -> None:
    assert status_of(error) == status
    body = body_of(error)["error"]
    assert (body["type"], body["code"], body["param"]) == (kind, code, error.where or None)
    assert headers_of(error).get("retry-after") == {429: "2", 503: "1"}.get(status)
