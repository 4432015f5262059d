"""The public HTTP address of endpoints for a command that needs one: the running server's, or one for its own time."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llmo.api import Api
from llmo.doors.client import Client
from llmo.doors.server import running_server, serve_in_thread
from llmo.errors import LLMOError
from llmo.types import Asked


@dataclass(frozen=True, slots=True)
class Door:
    """Where endpoints answer over HTTP, and a key that may ask them; a `lasting` one outlives the command."""

    url: str
    key: str
    lasting: bool
    awake: Callable[[str], object] = field(repr=False, default=lambda name: None)  # starts an endpoint that rests
    closing: threading.Event = field(default_factory=threading.Event)

    def endpoint(self, name: str) -> str:
        return f"{self.url}/v1/endpoints/{name}/predict"

    @property
    def chat(self) -> str:
        """Where models that generate answer in OpenAI's protocol."""
        return f"{self.url}/v1/chat/completions"

    def curl(self, name: str, asked: Asked = "Shares rose after the bank's profits beat forecasts.") -> str:
        """A command that asks an endpoint that answers in one pass."""
        return self._curl(self.endpoint(name), {"text": asked} if isinstance(asked, str) else asked)

    def curl_chat(self, name: str) -> str:
        """A command that talks to an endpoint that generates."""
        return self._curl(self.chat, {"model": name, "messages": [{"role": "user", "content": "What is a computer?"}]})

    def _curl(self, url: str, body: Mapping[str, Any]) -> str:
        return (
            f"curl -s {url} -H 'Authorization: Bearer {self.key}' "
            f"-H 'Content-Type: application/json' -d {_quoted(json.dumps(body))}"
        )

    def predict(self, name: str, texts: Sequence[Asked], *, logits: bool = False) -> list[dict[str, Any]]:
        client = Client(self.url, self.key)
        try:
            return client.predict(name, texts, logits=logits)
        finally:
            client.close()

    def heard(self, name: str, golden: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """What the endpoint answers to a model's golden texts, as `verify` compares it."""
        self.awake(name)
        with Client(self.url, self.key) as client:
            if golden and "greedy" in golden[0]:
                return [_written(client, name, item) for item in golden]
            answers = client.predict(name, [item["text"] for item in golden], logits=True)
        return [{key: answer[key] for key in ("input_ids", "logits")} for answer in answers]

    def wait(self) -> None:
        """Until Ctrl-C."""
        while not self.closing.wait(3600):
            continue


def _written(client: Client, name: str, item: Mapping[str, Any]) -> dict[str, Any]:
    """The greedy answer to one golden prompt, token by token."""
    most = max(1, len(item["greedy"]))
    body: dict[str, Any] = {"model": name, "temperature": 0, "max_tokens": most, "return_token_ids": True}
    if item["messages"]:
        answer = client.complete(item["messages"], **body)
    else:
        answer = client.complete(prompt=item["input_ids"], **body)
    choice = answer["choices"][0]
    ids = answer["prompt_token_ids"]
    return {"input_ids": ids if item["messages"] else ids[0], "tokens": choice["token_ids"]}


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


@contextmanager
def gateway(api: Api) -> Iterator[Door]:
    """A door for as long as the block lasts. Its key, when one was made for it, is revoked at the end."""
    if isinstance(api, Client):
        yield Door(api.url, api.key or "", lasting=True)
        return
    from llmo.system import System  # the client alone does not need it

    if not isinstance(api, System):
        raise LLMOError(f"{type(api).__name__} has no endpoints over HTTP")
    key, secret = api.store.keys.create("this command", "predict")
    try:
        server = running_server(api.settings.home)
        if server is not None:
            yield Door(server.url, secret, lasting=True)
            return
        with serve_in_thread(api) as url:
            yield Door(url, secret, lasting=False, awake=api.awake)
    finally:
        api.store.keys.revoke(key.id)
