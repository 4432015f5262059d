"""Chat over HTTP, asked by the official client: streams, forms, errors, disconnects, and a swap under load."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from fastapi import FastAPI

from llmo.errors import GateRefused
from llmo.guard.access import check_declared, declare
from llmo.guard.limits import Quota
from llmo.serve.gateway import Gateway, include_gateway
from llmo.serve.protocol import predict_once
from llmo.serve.server import HttpServer
from llmo.store import Store
from llmo.tasks.card import read_golden, write_golden
from llmo.types import Needs
from support.serving import ProcessReplica, ThreadReplica, deploy, eventually, greedy, served_chat_model, served_model
from support.tiny_chat import tiny_chat_tokenizer

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hello there"}]
YES_OR_NO = {"regex": "(yes|no)"}
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": ["small", "large"]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"here": {"type": "boolean"}},
            "required": ["here"],
            "additionalProperties": False,
        },
    },
}


@dataclass
class Site:
    """A running gateway over a store of its own."""

    url: str
    port: int
    store: Store
    gateway: Gateway
    key: str
    job: int

    def client(self, key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0, timeout=60)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {self.key}"}, timeout=60)

    def point(self, name: str, address: str, task: str = "generation", model_ref: str = "m@1") -> None:
        self.store.endpoints.set(
            name, job=self.job, model="sha256:0", model_ref=model_ref, state="up", address=address, task=task
        )
        router = self.gateway.router
        eventually(
            lambda: any((e.name, e.address) == (name, address) for e in router.endpoints()),
            f"the gateway hears of {address}",
        )

    def numbers(self, endpoint: str = "chat") -> dict[str, Any]:
        """The replica's own, asked through the gateway's loop as a scrape is."""
        admin = self.store.keys.create("tests", "admin")[1]
        text = httpx.get(f"{self.url}/metrics", headers={"x-api-key": admin}, timeout=60).text
        lines = [line.rpartition(" ") for line in text.splitlines() if f'{{endpoint="{endpoint}"}}' in line]
        return {name.partition("{")[0]: float(value) for name, _, value in lines}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_chat_model(tmp_path_factory.mktemp("model") / "chat")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    store = Store.open(tmp_path_factory.mktemp("home") / "home")
    app = FastAPI()
    gateway = include_gateway(app, store)
    for path in ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"):
        declare(app.routes, path, "public")
    check_declared(app)
    key = store.keys.create("tests", "predict")[1]
    job = store.jobs.insert(op="serve", spec={}, inputs={}, needs=Needs(), service=True)
    with HttpServer(app) as server:
        yield Site(server.url, server.port, store, gateway, key, job.id)
    store.close()


def deployed(**changes: Any) -> dict[str, Any]:
    return deploy(**{"cache_mib": 16, "streams": 8, **changes})


@pytest.fixture(scope="module")
def chat(site: Site, model: Path) -> Iterator[ThreadReplica]:
    with ThreadReplica(model, deployed()) as replica:
        site.point("chat", replica.address)
        yield replica


@pytest.fixture
def ask(site: Site, chat: ThreadReplica) -> Iterator[openai.OpenAI]:
    with site.client() as client:
        yield client


def whole(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "chat", "messages": HELLO, "max_tokens": 24, **more})


def streamed(client: openai.OpenAI, **more: Any) -> list[Any]:
    return list(whole(client, stream=True, **more))


def said(chunks: list[Any], index: int = 0) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices and c.choices[0].index == index)


def test_greedy_answers_are_those_of_the_model_run_by_transformers(ask: openai.OpenAI, model: Path) -> None:
    answer = whole(ask, temperature=0, extra_body={"return_token_ids": True})
    ids = answer.prompt_token_ids
    expected = greedy(model, ids, 24)
    assert answer.choices[0].token_ids == expected
    assert answer.choices[0].message.content == tiny_chat_tokenizer().decode(expected)
    assert answer.system_fingerprint == "m@1"
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(expected)
    assert answer.choices[0].finish_reason == ("length" if len(expected) == 24 else "stop")


def test_a_stream_is_the_whole_answer_in_pieces(ask: openai.OpenAI) -> None:
    at_once = whole(ask, temperature=0)
    chunks = streamed(ask, temperature=0, stream_options={"include_usage": True})
    assert said(chunks) == at_once.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == at_once.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == at_once.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_seed_gives_the_same_answer_alone_and_among_others(site: Site, ask: openai.OpenAI) -> None:
    alone = whole(ask, seed=5).choices[0].message.content
    assert alone != whole(ask, seed=6).choices[0].message.content

    def work(number: int) -> tuple[int, str]:
        with site.client() as client:
            seed = 5 if number % 3 == 0 else number
            return seed, said(streamed(client, seed=seed)) if number % 2 else whole(client, seed=seed).choices[
                0
            ].message.content

    with ThreadPoolExecutor(12) as threads:
        answers = [text for seed, text in threads.map(work, range(24)) if seed == 5]
    assert len(answers) >= 8
    assert set(answers) == {alone}


def test_an_answer_stops_before_its_stop_string(ask: openai.OpenAI) -> None:
    full = whole(ask, extra_body={"regex": "[ab]{6}STOP[ab]{20}"}, seed=1, max_tokens=40).choices[0].message.content
    stopped = whole(ask, extra_body={"regex": "[ab]{6}STOP[ab]{20}"}, seed=1, stop="STOP", max_tokens=40).choices[0]
    assert stopped.message.content == full[:6]
    assert stopped.finish_reason == "stop"
    chunks = streamed(ask, extra_body={"regex": "[ab]{6}STOP[ab]{20}"}, seed=1, stop=["xx", "TOP"], max_tokens=40)
    assert said(chunks) == full[:7]


def test_several_answers_and_their_usage(ask: openai.OpenAI) -> None:
    answer = whole(ask, n=3, seed=2, temperature=1.5, max_tokens=8)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    chunks = streamed(ask, n=3, seed=2, temperature=1.5, max_tokens=8)
    assert [said(chunks, index) for index in range(3)] == texts
    assert answer.usage.prompt_tokens == whole(ask).usage.prompt_tokens


def test_log_probabilities_are_the_tokens_own(ask: openai.OpenAI) -> None:
    answer = whole(ask, temperature=0, logprobs=True, top_logprobs=3, max_tokens=8)
    found = answer.choices[0].logprobs.content
    assert len(found) == answer.usage.completion_tokens
    assert all(one.logprob == one.top_logprobs[0].logprob for one in found), "greedy takes the likeliest"
    data = bytes(byte for one in found for byte in one.bytes)
    assert data.decode("utf-8", "replace") == answer.choices[0].message.content
    chunks = streamed(ask, temperature=0, logprobs=True, top_logprobs=3, max_tokens=8)
    parts = [one for c in chunks if c.choices and c.choices[0].logprobs for one in c.choices[0].logprobs.content]
    assert [one.logprob for one in parts] == pytest.approx([one.logprob for one in found], abs=1e-4)


def test_json_by_schema_whole_and_streamed(ask: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        answer = whole(ask, response_format=form, seed=seed, max_tokens=100)
        value = json.loads(answer.choices[0].message.content)
        assert set(value) == {"ok", "size"}
        assert answer.choices[0].finish_reason == "stop"
        assert json.loads(said(streamed(ask, response_format=form, seed=seed, max_tokens=100))) == value
    any_object = whole(ask, response_format={"type": "json_object"}, seed=1, max_tokens=4, temperature=0)
    assert any_object.choices[0].message.content.startswith("{")


def test_a_regular_expression_is_followed(ask: openai.OpenAI) -> None:
    assert whole(ask, extra_body=YES_OR_NO).choices[0].message.content in ("yes", "no")
    assert whole(ask, extra_body={"guided_regex": "[0-9]{3}"}).choices[0].message.content.isdigit()


def test_a_forced_call_of_a_tool(ask: openai.OpenAI) -> None:
    other = {"type": "function", "function": {"name": "time"}}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        answer = whole(ask, tools=[WEATHER], tool_choice=choice, max_tokens=60).choices[0]
        (call,) = answer.message.tool_calls
        assert call.function.name == "weather"
        assert set(json.loads(call.function.arguments)) == {"here"}
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
    chunks = streamed(ask, tools=[other, WEATHER], tool_choice="required", max_tokens=60, seed=1)
    (call,) = [one for c in chunks if c.choices for one in c.choices[0].delta.tool_calls or []]
    assert call.function.name in ("weather", "time")
    assert said(chunks) == ""
    with pytest.raises(openai.BadRequestError, match="takes no tools"):
        whole(ask, tools=[WEATHER])


def test_completions_of_texts_and_of_tokens(ask: openai.OpenAI) -> None:
    answer = ask.completions.create(model="chat", prompt=["Once", "Twice"], max_tokens=6, temperature=0, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    ids = tiny_chat_tokenizer().encode("Once").ids
    same = ask.completions.create(model="chat", prompt=ids, max_tokens=6, temperature=0)
    assert same.choices[0].text == answer.choices[0].text
    assert len(answer.choices[0].logprobs.token_logprobs) == 6
    chunks = ask.completions.create(model="chat", prompt="Once", max_tokens=6, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == same.choices[0].text


def test_responses_whole_streamed_and_with_a_call(ask: openai.OpenAI) -> None:
    answer = ask.responses.create(model="chat", input="Hello there", max_output_tokens=24, temperature=0)
    assert answer.output_text == whole(ask, temperature=0).choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    events = list(ask.responses.create(model="chat", input=HELLO, max_output_tokens=24, temperature=0, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer.output_text
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert events[-1].response.output_text == answer.output_text
    tool = {"type": "function", "strict": False, **WEATHER["function"]}
    called = ask.responses.create(model="chat", input="hi", tools=[tool], tool_choice="required", max_output_tokens=60)
    assert called.output[0].type == "function_call"
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    assert json.loads(ask.responses.create(model="chat", input="hi", text=form, max_output_tokens=99).output_text)


def test_models_are_the_endpoints_that_generate(site: Site, ask: openai.OpenAI, tmp_path: Path) -> None:
    with ThreadReplica(served_model(tmp_path / "m")) as encoder:
        site.point("topics", encoder.address, task="text-classification")
        assert [model.id for model in ask.models.list()] == ["chat"]
        assert ask.models.retrieve("chat").id == "chat"
        for name in ("topics", "nothing"):
            with pytest.raises(openai.NotFoundError):
                ask.models.retrieve(name)
        with pytest.raises(openai.BadRequestError, match="does not generate"):
            whole(ask, model="topics")
        with pytest.raises(openai.BadRequestError, match="no embeddings") as refused:
            ask.embeddings.create(model="chat", input="hi")
        assert (refused.value.param, refused.value.code) == ("model", "unsupported_model")
        site.store.endpoints.remove("topics")


def test_predict_answers_each_text_as_a_users_message(site: Site, ask: openai.OpenAI, chat: ThreadReplica) -> None:
    with site.http() as client:
        found = client.post("/v1/endpoints/chat/predict", json={"texts": ["Hello there", "Good night"], "logits": True})
    one, _ = found.json()["answers"]
    assert one["text"].startswith(whole(ask, temperature=0).choices[0].message.content)
    assert len(one["output_ids"]) == len(one["logprobs"]) == one["completion_tokens"]
    assert predict_once(chat.address, ["Hello there"])[0]["text"] == one["text"]


BAD: list[tuple[Any, str, str | None]] = [
    ({"max_tokens": 2**63}, "is from 1", "integer_above_max_value"),
    ({"max_tokens": 0}, "is from 1", "integer_below_min_value"),
    ({"max_tokens": "5"}, "is an integer", "invalid_type"),
    (b'{"model": "chat", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "NaN", None),
    ({"temperature": 3}, "from 0 to 2", "decimal_above_max_value"),
    ({"stop": ["x"] * 100_000}, "at most 16", "array_above_max_length"),
    ({"stop": "x" * 257}, "1 to 256", "invalid_value"),
    ({"messages": []}, "at least one message", "missing_required_parameter"),
    ({"messages": "hello"}, "is a list", "invalid_type"),
    ({"messages": [1]}, "is an object", "invalid_type"),
    ({"messages": [{"role": "wizard", "content": "a"}]}, "the role is one of", "invalid_value"),
    ({"messages": [{"role": "user", "content": ""}]}, "is empty", None),
    ({"messages": [{"role": "user", "content": 7}]}, "a text or a list", "invalid_type"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads text only", "invalid_value"),
    (b'{"model": "chat", "messages": [{"role": "user", "content": "\\ud83d"}]}', "surrogate", None),
    ({"messages": [{"role": "user", "content": "x" * 5_000_000}]}, "context length", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "context length", "context_length_exceeded"),
    ({"regex": "(a+)+b"}, "repetition", None),
    ({"regex": "(a"}, "regex", None),
    ({"response_format": {"type": "xml"}}, "json_schema", "invalid_value"),
    ({"n": 9}, "from 1 to 8", "integer_above_max_value"),
    ({"logit_bias": {"5": 100}}, "not supported", "unsupported_parameter"),
    ({"tool_choice": "required"}, "no tools", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "'stream': true", "invalid_value"),
    (b'{"model": "chat", "messages": ' + b"[" * 100_000, "too deeply", None),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "array", "items": {"$ref": "#"}}},
            }
        },
        "refers to itself",
        "invalid_json_schema",
    ),
]


@pytest.mark.parametrize(("body", "says", "code"), BAD)
def test_a_bad_request_is_a_400_with_a_reason_and_serving_goes_on(
    site: Site, chat: ThreadReplica, body: Any, says: str, code: str | None
) -> None:
    data = body if isinstance(body, bytes) else json.dumps({"model": "chat", "messages": HELLO, **body}).encode()
    with site.http() as client:
        answer = client.post(CHAT, content=data)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert says in error["message"]
        assert error["type"] == "invalid_request_error"
        assert error["code"] == code
        good = client.post(CHAT, json={"model": "chat", "messages": HELLO, "max_tokens": 2})
        assert good.status_code == 200


def test_what_openai_ignores_is_ignored(ask: openai.OpenAI) -> None:
    more = {"no_such_field": 1, "store": True, "metadata": {"a": "b"}, "user": "someone", "service_tier": "auto"}
    assert whole(ask, extra_body=more, logit_bias={}).choices[0].finish_reason


def test_keys_models_and_bodies_that_are_wrong(site: Site, ask: openai.OpenAI) -> None:
    with site.client("llmo_wrong") as stranger, pytest.raises(openai.AuthenticationError) as unknown:
        whole(stranger)
    assert unknown.value.code == "invalid_api_key"
    with pytest.raises(openai.NotFoundError, match="did you mean 'chat'") as missing:
        whole(ask, model="chad")
    assert missing.value.code == "model_not_found"
    with site.http() as client:
        assert client.get("/v1/models", headers={"authorization": ""}).status_code == 401
        large = client.post(CHAT, content=b"x" * (9 << 20))
        assert large.status_code == 413
        assert large.json()["error"]["code"] == "request_too_large"
        assert client.get(CHAT).status_code == 405


def test_a_quota_is_answered_429_with_retry_after(site: Site, chat: ThreadReplica) -> None:
    key, secret = site.store.keys.create("greedy", "predict")
    site.gateway.quotas.set(key.id, Quota(rate=0.001, burst=2))
    with site.client(secret) as client:
        whole(client, n=2, max_tokens=1)
        with pytest.raises(openai.RateLimitError) as over:
            whole(client, max_tokens=1)
    assert over.value.code == "rate_limit_exceeded"
    assert int(over.value.response.headers["retry-after"]) > 1


def test_a_full_queue_is_answered_429_and_the_others_finish(site: Site, model: Path) -> None:
    with ThreadReplica(model, deployed(streams=1, queue=2)) as replica:
        site.point("narrow", replica.address)

        def work(number: int) -> str:
            with site.client() as client:
                try:
                    return str(whole(client, model="narrow", max_tokens=200, temperature=0).choices[0].finish_reason)
                except openai.RateLimitError as error:
                    return f"busy for {error.response.headers['retry-after']} s"

        with ThreadPoolExecutor(12) as threads:
            ends = list(threads.map(work, range(12)))
        refused = [end for end in ends if end.startswith("busy")]
        assert refused
        assert all(int(end.split()[2]) >= 1 for end in refused)
        assert len(ends) - len(refused) >= 3, "what ran and what waited"
        with site.client() as client:
            assert whole(client, model="narrow", max_tokens=1).choices
    site.store.endpoints.remove("narrow")


def hang_up(site: Site, number: int) -> None:
    """A client that leaves in the middle of a stream; its prompt is like no other's."""
    messages = [{"role": "user", "content": f"{number} {HELLO[0]['content'] * (number % 8)}"}]
    asked = {"model": "left", "messages": messages, "max_tokens": 300, "stream": True, "seed": number}
    body = json.dumps(asked).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {site.key}\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        heard = b""
        while heard.count(b"data: ") < 3:
            heard += connection.recv(1 << 16)


def test_two_hundred_clients_that_leave_in_mid_stream_leave_nothing(site: Site, model: Path) -> None:
    """Eight at a time: every slot and the whole cache are free after them, and the second hundred needs no memory that
    the first did not. The cache is small, so that the first touches all of it."""
    with ProcessReplica(model, deployed(cache_mib=1)) as replica:
        site.point("left", replica.address)
        memory = []
        for first in (0, 100):
            with ThreadPoolExecutor(8) as threads:
                list(threads.map(lambda number: hang_up(site, number), range(first, first + 100)))
            left = eventually(
                lambda: (
                    (found := site.numbers("left"))["llmo_in_flight_requests"] == 0
                    and found["llmo_streams"] == found["llmo_queue_texts"] == 0
                    and found["llmo_cache_free_tokens"] == found["llmo_cache_tokens"]
                    and found
                ),
                "every slot and the whole cache are free",
            )
            memory.append(psutil.Process(replica.process.pid).memory_info().rss)
        assert left["llmo_cancelled_requests_total"] >= 180, "some may be complete before their clients have gone"
        assert memory[1] - memory[0] < 8 << 20
        assert whole(site.client(), model="left", max_tokens=1).choices
    site.store.endpoints.remove("left")


def test_a_swap_in_mid_stream_finishes_what_had_begun(site: Site, model: Path) -> None:
    with ThreadReplica(model, deployed()) as old, site.client() as client:
        site.point("moving", old.address)
        stream = iter(whole(client, model="moving", max_tokens=300, temperature=0, stream=True))
        first = next(stream)
        with ThreadReplica(model, deployed()) as new:
            site.point("moving", new.address, model_ref="m@2")
            old.ask_to_stop()
            text = said([first, *stream])
            assert whole(client, model="moving", max_tokens=300, temperature=0).choices[0].message.content == text
            assert whole(client, model="moving", max_tokens=1).system_fingerprint == "m@2"
    site.store.endpoints.remove("moving")


def test_a_replica_that_dies_in_mid_stream_is_an_error_of_the_stream(site: Site, model: Path) -> None:
    with ProcessReplica(model, deployed()) as replica, site.client() as client:
        site.point("mortal", replica.address)
        stream = iter(whole(client, model="mortal", max_tokens=450, seed=1, stream=True))
        next(stream)
        replica.kill()
        with pytest.raises(openai.APIError, match="ended in the middle"):
            list(stream)
        with pytest.raises(openai.InternalServerError) as gone:
            whole(client, model="mortal")
        assert gone.value.status_code == 503
    site.store.endpoints.remove("mortal")


def test_the_numbers_of_a_scrape(site: Site, ask: openai.OpenAI) -> None:
    before = site.numbers()
    answer = whole(ask, max_tokens=5, seed=3)
    after = site.numbers()
    assert after["llmo_completion_tokens_total"] - before["llmo_completion_tokens_total"] == (
        answer.usage.completion_tokens
    )
    assert after["llmo_first_token_seconds_count"] - before["llmo_first_token_seconds_count"] == 1
    assert after["llmo_prompt_cached_tokens_total"] > before["llmo_prompt_cached_tokens_total"]
    assert after["llmo_streams_limit"] == 8
    assert after["llmo_generated_tokens_per_second"] > 0


@pytest.mark.parametrize("damage", ["tokens", "answers"])
def test_a_model_that_does_not_repeat_its_evidence_never_gets_ready(tmp_path: Path, damage: str) -> None:
    folder = served_chat_model(tmp_path / "m")
    golden = read_golden(folder)
    assert len(golden[2]["greedy"]) > 2
    if damage == "tokens":
        golden[2]["input_ids"] = golden[2]["input_ids"][:-1]
    else:
        golden[2]["greedy"][1] = golden[2]["greedy"][1] % 250 + 4
    write_golden(folder, golden)
    replica = ThreadReplica(folder, deployed())
    with pytest.raises(GateRefused):
        replica.start()
    assert replica.address == ""


def test_no_thread_of_a_replica_is_left(model: Path) -> None:
    names = {"llmo-prompts", "llmo-engine", "llmo-answers"}
    before = [thread for thread in threading.enumerate() if thread.name in names]
    with ThreadReplica(model, deployed()):
        assert len([thread for thread in threading.enumerate() if thread.name in names]) == len(before) + 3
    assert [thread for thread in threading.enumerate() if thread.name in names] == before
