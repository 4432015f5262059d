"""The public HTTP address of endpoints for a command that needs one: the running server's, or one for its own time."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llmo.api import Api
from llmo.doors.client import Client
from llmo.doors.server import running_server, serve_in_thread
from llmo.errors import LLMOError


@dataclass(frozen=True, slots=True)
class Door:
    """Where endpoints answer over HTTP, and a key that may ask them; a `lasting` one outlives the command."""

    url: str
    key: str
    lasting: bool
    closing: threading.Event = field(default_factory=threading.Event)

    def endpoint(self, name: str) -> str:
        return f"{self.url}/v1/endpoints/{name}/predict"

    @property
    def chat(self) -> str:
        """Where models that generate answer in OpenAI's protocol."""
        return f"{self.url}/v1/chat/completions"

    def curl(self, name: str) -> str:
        """A command that asks an endpoint that labels texts."""
        return self._curl(self.endpoint(name), {"text": "Shares rose after the bank's profits beat forecasts."})

    def curl_chat(self, name: str) -> str:
        """A command that talks to an endpoint that generates."""
        return self._curl(self.chat, {"model": name, "messages": [{"role": "user", "content": "What is a computer?"}]})

    def _curl(self, url: str, body: Mapping[str, Any]) -> str:
        return (
            f"curl -s {url} -H 'Authorization: Bearer {self.key}' "
            f"-H 'Content-Type: application/json' -d {_quoted(json.dumps(body))}"
        )

    def predict(self, name: str, texts: Sequence[str], *, logits: bool = False) -> list[dict[str, Any]]:
        client = Client(self.url, self.key)
        try:
            return client.predict(name, texts, logits=logits)
        finally:
            client.close()

    def wait(self) -> None:
        """Until Ctrl-C."""
        while not self.closing.wait(3600):
            continue


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
            yield Door(url, secret, lasting=False)
    finally:
        api.store.keys.revoke(key.id)
