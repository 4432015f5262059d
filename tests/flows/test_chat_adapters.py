"""Adapters of a running endpoint: 50 mixed, added and removed under load, refused, and there again after a restart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from llmo.doors import flow
from llmo.doors.cli import commands
from llmo.doors.client import Client
from llmo.doors.sdk import Deployed
from llmo.errors import ConflictError, InputError, ModelError, NotFoundError, SpecError
from llmo.types import Artifact, Kind
from support.serving import Place, ThreadReplica, deploy, eventually, served_chat_model
from support.tiny_chat import tiny_adapter

HELLO = [{"role": "user", "content": "Hello there"}]
MANY = 50


@dataclass
class Chat(Place):
    """With the endpoint `chat`, whose model is `base@1`, and a member's client."""

    model: Path = field(init=False)
    client: openai.OpenAI = field(init=False)

    def publish(self, name: str, base: str, **adapter: Any) -> Artifact:
        """A model that was trained with LoRA on `base`."""
        made = self.folder / name
        tiny_adapter(made / "adapter", **adapter)
        return self.system.store.catalog.publish(Kind.MODEL, name, made, {}, job=None, inputs={"model": base})

    def serve(self, model: str) -> None:
        """A new replica, which knows nothing of adapters, takes the endpoint over; it serves what is called `model`."""
        replica = self.stack.enter_context(ThreadReplica(self.model, deploy(cache_mib=16, streams=8)))
        self.point(model, replica.address)

    def point(self, model: str, address: str | None = None) -> None:
        known = {endpoint.name: endpoint.address for endpoint in self.system.store.endpoints.list()}
        self.system.store.endpoints.set(
            "chat",
            job=None,
            model=model,
            model_ref="served@1",
            state="up",
            address=address or known["chat"],
            task="generation",
        )

    def answer(self, model: str, **more: Any) -> Any:
        asked = {"model": model, "messages": HELLO, "temperature": 0, "max_tokens": 16, **more}
        return self.client.chat.completions.create(**asked)

    def text(self, model: str, **more: Any) -> str:
        return str(self.answer(model, **more).choices[0].message.content)

    def missing(self, model: str) -> openai.NotFoundError:
        """What is said of a model that is not there any more, in a moment."""

        def refused() -> openai.NotFoundError | None:
            try:
                self.answer(model, max_tokens=1)
            except openai.NotFoundError as error:
                return error
            return None

        return eventually(refused, f"{model} is gone")  # type: ignore[return-value]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chat]:
    with Chat.opened(tmp_path_factory.mktemp("adapters")) as made:
        made.model = served_chat_model(made.folder / "model")
        client = openai.OpenAI(base_url=f"{made.url}/v1", api_key=made.key, max_retries=0, timeout=60)
        made.client = made.stack.enter_context(client)
        made.serve(made.base.digest)
        for i in range(MANY):
            made.publish(f"voice{i}", made.base.digest, seed=i, rank=2 + i % 5)
        yield made


@pytest.fixture
def api(place: Chat) -> Iterator[Client]:
    with Client(place.url, place.key) as client:
        yield client


@pytest.fixture
def two(place: Chat, api: Client) -> Iterator[None]:
    """`a` and `b` are adapters of the endpoint."""
    for name, model in (("a", "voice0"), ("b", "voice1@1")):
        api.add_adapter("chat", name, model)
    yield
    for adapter in api.adapters("chat"):
        api.remove_adapter("chat", adapter.name)


def test_fifty_answer_mixed_as_they_do_alone(place: Chat, api: Client) -> None:
    names = [f"chat:v{i}" for i in range(MANY)]
    for i in range(MANY):
        api.add_adapter("chat", f"v{i}", f"voice{i}")
    alone = [place.text(name) for name in ["chat", *names]]
    with ThreadPoolExecutor(16) as threads:
        mixed = list(threads.map(place.text, ["chat", *names]))
    assert mixed == alone
    assert len(set(alone)) > MANY // 2
    for i in range(MANY):
        api.remove_adapter("chat", f"v{i}")
    assert api.adapters("chat") == []


@pytest.mark.usefixtures("two")
def test_a_model_is_an_endpoint_an_adapter_or_the_version_of_either(place: Chat, api: Client) -> None:
    eventually(lambda: _models(place) == ["chat", "chat:a", "chat:b"], "all three are listed")
    assert place.client.models.retrieve("chat:a").id == "chat:a"
    plain, voiced = place.answer("chat"), place.answer("chat:a")
    assert plain.choices[0].message.content != voiced.choices[0].message.content
    assert (plain.system_fingerprint, voiced.system_fingerprint) == ("served@1", "voice0@1")
    assert place.text("served@1") == plain.choices[0].message.content
    assert place.text("voice0@1") == voiced.choices[0].message.content
    (predicted,) = api.predict("chat:a", ["Hello there"])
    assert predicted["text"].startswith(voiced.choices[0].message.content)
    meant = {name: flow.asked(api, name) for name in ("chat", "served@1", "chat:a", "voice0@1", "nobody@1")}
    assert [*meant.values()] == [("chat", None), ("chat", None), ("chat", "a"), ("chat", "a"), ("nobody@1", None)]
    for model, says in (("chat:c", "it has: a, b"), ("chad:a", "did you mean 'chat'"), ("voice7@1", "no endpoint")):
        with pytest.raises(openai.NotFoundError, match=says) as missing:
            place.answer(model)
        assert missing.value.code == "model_not_found"


@pytest.mark.usefixtures("two")
def test_they_come_and_go_under_running_streams(place: Chat, api: Client) -> None:
    expected = {name: place.text(name, max_tokens=200) for name in ("chat", "chat:a", "chat:b")}
    streams = {name: iter(place.answer(name, max_tokens=200, stream=True)) for name in expected}
    begun = {name: next(stream).choices[0].delta.content or "" for name, stream in streams.items()}
    for i in range(2, 6):
        api.add_adapter("chat", f"c{i}", f"voice{i}")
        assert place.text(f"chat:c{i}")
        api.remove_adapter("chat", f"c{i}")
    api.remove_adapter("chat", "a")
    found = {
        name: begun[name] + "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        for name, stream in streams.items()
    }
    assert found == expected
    assert "has no adapter 'a'" in str(place.missing("chat:a"))
    assert place.text("chat:b", max_tokens=200) == expected["chat:b"]


@pytest.mark.usefixtures("two")
def test_what_does_not_fit_is_refused_and_the_others_answer_on(place: Chat, api: Client) -> None:
    before = place.text("chat:a")
    base = place.base.digest
    other = place.publish("stranger", place.system.artifact("voice0").digest)
    place.publish("silent", base, scale=0.0)
    place.publish("deeper", base, layers=3)
    for name, model, error, says in (
        ("c", other.ref, ModelError, "stranger@1 was trained on voice0@1"),
        ("c", "silent", ModelError, "changes nothing"),
        ("c", "deeper", ModelError, "not all of the adapter applies"),
        ("c", "base", ModelError, "no adapter beside its weights"),
        ("a", "voice3", ConflictError, "an adapter 'a' already"),
        ("c", "nothing", NotFoundError, "nothing"),
    ):
        with pytest.raises(error, match=says) as caught:
            api.add_adapter("chat", name, model)
        assert caught.value.hint
    with pytest.raises(SpecError, match="use letters, digits"):
        api.add_adapter("chat", "c:d", "voice3")
    for work in (api.adapters, lambda name: api.add_adapter(name, "c", "voice3")):
        with pytest.raises(NotFoundError, match="no endpoint"):
            work("nobody")
    with pytest.raises(NotFoundError, match=r"did you mean 'a'|has no adapter"):
        api.remove_adapter("chat", "aa")
    assert [adapter.name for adapter in api.adapters("chat")] == ["a", "b"]
    assert place.text("chat:a") == before


@pytest.mark.usefixtures("two")
def test_a_new_replica_answers_with_them_and_another_base_does_not(place: Chat, api: Client) -> None:
    before = place.text("chat:a")
    place.serve(place.base.digest)
    assert place.text("chat:a") == before
    (place.folder / "small").mkdir(exist_ok=True)
    (place.folder / "small" / "config.json").write_text("{}")
    small = place.system.store.catalog.publish(
        Kind.MODEL, "small", place.folder / "small", {"reference": {}}, job=None, inputs={"model": place.base.digest}
    )
    place.point(small.digest)
    assert place.text("chat:a") == before, "a compressed model has the adapters of what it was made from"
    place.point(place.system.artifact("voice9").digest)
    assert "no adapter 'a'" in str(place.missing("chat:a"))
    assert [adapter.answers for adapter in api.adapters("chat")] == [False, False]
    place.point(place.base.digest)
    assert [adapter.answers for adapter in api.adapters("chat")] == [True, True]
    assert eventually(lambda: "chat:a" in _models(place), "they are back")
    assert place.text("chat:a") == before


def _models(place: Chat) -> list[str]:
    return [model.id for model in place.client.models.list()]


def test_the_command_line_and_the_sdk_say_the_same(
    place: Chat, api: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMO_URL", place.url)
    monkeypatch.setenv("LLMO_KEY", place.key)
    assert commands.run(["adapters", "chat", "--add", "new=voice5", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["name"], told["model_ref"]) == ("new", "voice5@1")
    deployed = Deployed("chat", api)
    assert [adapter.name for adapter in deployed.adapters()] == ["new"]
    assert commands.run(["adapters", "chat"]) == 0
    assert "chat:new" in capsys.readouterr().out
    assert commands.run(["adapters", "chat", "--add", "voice5"]) == InputError.exit_code
    assert "--add formal=formal@2" in capsys.readouterr().err
    assert commands.run(["adapters", "chat", "--remove", "new", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    deployed.add_adapter("more", place_model(api))
    deployed.remove_adapter("more")
    with pytest.raises(NotFoundError):
        deployed.remove_adapter("more")


def place_model(api: Client) -> Any:
    from llmo.doors.sdk import Model

    return Model.get("voice6", api=api)
