"""Heads and adapters of a running endpoint over an encoder: mixed, added and removed under load, refused, verified."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

import llmo as sdk
from llmo.compression.export import export
from llmo.doors.cli import commands
from llmo.doors.client import Client
from llmo.doors.gateway import gateway
from llmo.doors.sdk import Deployed
from llmo.errors import ConflictError, GateRefused, InputError, ModelError, NotFoundError
from llmo.settings import Settings
from llmo.system import System
from llmo.tasks.base import Task
from llmo.tasks.card import read_card, read_golden, write_card, write_golden
from llmo.tasks.text_classification import TextClassification
from llmo.tasks.token_classification import TokenClassification
from llmo.types import Artifact, Kind
from support.headed import further_model, topics
from support.project import project
from support.serving import Place, ThreadReplica, deploy, eventually, served_model, with_evidence
from support.tiny import text_rows
from support.tiny_chat import tiny_adapter

CLOSE = 1e-5  # of logits at fp32: mixed, alone, and of the model served by itself
TEXTS = [row["text"] for row in text_rows(12, seed=3, longest=40)]
NAMES = TokenClassification(["O", "B-person", "I-person"], 48)
MANY: dict[str, tuple[Task, str]] = {
    "urgent": (topics(2), "head"),
    "short": (topics(5, max_length=8), "head"),
    "many": (TextClassification(["a", "b", "c"], 64, multi_label=True), "head"),
    "names": (NAMES, "head"),
    "tuned": (topics(4), "lora"),
    "tuned-names": (NAMES, "lora"),
}


@dataclass
class Trunk(Place):
    """With the endpoint `news`, whose model `news@1` was trained by method head on `base@1`."""

    news: Artifact = field(init=False)

    def publish(self, name: str, folder: Path, base: str, **card: Any) -> Artifact:
        """Gives the folder away: its files move into the store."""
        told = {**read_card(folder), **card}
        return self.system.store.catalog.publish(Kind.MODEL, name, folder, told, job=None, inputs={"model": base})

    def further(self, name: str, task: Task, method: str, *, seed: int = 1, base: str = "") -> Artifact:
        trunk = self.system.store.catalog.path(self.news.digest)
        made = with_evidence(further_model(self.folder / name, trunk, task, method, seed=seed))
        return self.publish(name, made, base or self.base.digest, method=method)

    def serve(self, model: Artifact, **changes: Any) -> None:
        """A new replica, which knows nothing of further models, takes the endpoint over."""
        folder = self.system.store.catalog.path(model.digest)
        replica = self.stack.enter_context(ThreadReplica(folder, deploy(queue=128, **changes)))
        up: dict[str, Any] = {"state": "up", "task": "text-classification", "address": replica.address}
        self.system.store.endpoints.set("news", job=None, model=model.digest, model_ref=model.ref, **up)

    def by_itself(self, ref: str, texts: list[str]) -> list[dict[str, Any]]:
        """What a replica answers that serves only this model."""
        from llmo.serve.protocol import predict_once

        with ThreadReplica(self.system.path(ref)) as replica:
            return predict_once(replica.address, texts, logits=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trunk]:
    with Trunk.opened(tmp_path_factory.mktemp("trunk")) as made:
        made.news = made.publish("news", served_model(made.folder / "news"), made.base.digest, method="head")
        made.serve(made.news)
        for seed, (name, (task, method)) in enumerate(MANY.items()):
            made.further(name, task, method, seed=seed)
        yield made


@pytest.fixture
def api(place: Trunk) -> Iterator[Client]:
    with Client(place.url, place.key) as client:
        yield client


@pytest.fixture
def all_of_them(api: Client) -> Iterator[list[str]]:
    """The names that the endpoint answers to."""
    for name in MANY:
        api.add_adapter("news", name, name)
    yield ["news", *(f"news:{name}" for name in MANY)]
    for adapter in api.adapters("news"):
        api.remove_adapter("news", adapter.name)


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """The same answers, but for the last digits of their numbers."""

    def plain(answer: dict[str, Any]) -> Any:
        return {k: v for k, v in answer.items() if k not in ("logits", "score", "scores", "entities")}

    assert [plain(one) for one in found] == [plain(one) for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert np.abs(np.array(one["logits"]) - np.array(other["logits"])).max() < CLOSE
        spans = [[(e["start"], e["end"], e["label"]) for e in each.get("entities", [])] for each in (one, other)]
        assert spans[0] == spans[1]
    return True


def test_mixed_answers_are_those_alone_and_those_of_each_by_itself(
    place: Trunk, api: Client, all_of_them: list[str]
) -> None:
    alone = {name: [api.predict(name, [text], logits=True)[0] for text in TEXTS] for name in all_of_them}
    with ThreadPoolExecutor(len(all_of_them)) as threads:
        mixed = list(threads.map(lambda name: api.predict(name, TEXTS, logits=True), all_of_them * 3))
    for name, found in zip(all_of_them * 3, mixed, strict=True):
        assert same(found, alone[name])
    for name in all_of_them:
        assert same(alone[name], place.by_itself(name.rpartition(":")[2], TEXTS))
    assert all("entities" in answer for answer in alone["news:names"])
    assert {len(answer["scores"]) for answer in alone["news:short"]} == {5}
    assert all(len(answer["input_ids"]) <= 8 for answer in alone["news:short"])
    assert any(answer.get("truncated") for answer in alone["news:short"])
    assert all("labels" in answer for answer in alone["news:many"])


@pytest.mark.usefixtures("all_of_them")
def test_every_door_takes_the_name(place: Trunk, api: Client) -> None:
    answer = httpx.post(
        f"{place.url}/v1/endpoints/news:urgent/predict",
        json={"text": TEXTS[0]},
        headers={"Authorization": f"Bearer {place.key}"},
    ).json()
    assert (answer["endpoint"], answer["model"]) == ("news:urgent", "urgent@1")
    assert api.predict("urgent@1", TEXTS[:1]) == answer["answers"]
    assert Deployed("news:urgent", api).predict(TEXTS[0]) == answer["answers"][0]
    with openai.OpenAI(base_url=f"{place.url}/v1", api_key=place.key, max_retries=0) as client:
        vectors = {
            name: np.array(client.embeddings.create(model=name, input=TEXTS[0]).data[0].embedding)
            for name in ("news", "news:urgent", "news:tuned", "news@1", "tuned@1")
        }
        assert list(client.models.list()) == [], "none of them writes"
    assert np.abs(vectors["news"] - vectors["news:urgent"]).max() < CLOSE
    assert np.abs(vectors["news"] - vectors["news:tuned"]).max() > 1e-3
    for version, name in (("news@1", "news"), ("tuned@1", "news:tuned")):
        assert np.abs(vectors[version] - vectors[name]).max() < CLOSE
    for name, says in (("news:urgnt", "did you mean 'urgent'"), ("new:urgent", "no endpoint"), ("short@7", "short")):
        for asks in (api.predict, place.system.predict):
            with pytest.raises(NotFoundError, match=says):
                asks(name, TEXTS[:1])
    metrics = httpx.get(f"{place.url}/metrics", headers={"Authorization": f"Bearer {place.key}"}).text
    assert 'endpoint="news"' in metrics
    assert "urgent" not in metrics


@pytest.mark.usefixtures("all_of_them")
def test_what_fails_is_counted_by_its_endpoint_whatever_the_name(place: Trunk) -> None:
    with httpx.Client(base_url=place.url, headers={"Authorization": f"Bearer {place.key}"}) as client:

        def refused() -> dict[str, float]:
            counts = (line.rpartition(" ") for line in client.get("/metrics").text.splitlines())
            told = {name: float(count) for name, _, count in counts if name.startswith("llmo_requests_total{")}
            return {name: count for name, count in told.items() if 'status="4' in name}

        before = refused()
        for name in ("news", "news:urgent", "news@1", "urgent@1", "nws", "nws:urgent", "nws@1"):
            assert client.post(f"/v1/endpoints/{name}/predict", json={"text": 5}).status_code == 422
            assert client.post("/v1/embeddings", json={"model": name, "input": "x " * 1000}).status_code in (400, 404)
        more = {name: count - before.get(name, 0) for name, count in refused().items()}
    label = 'llmo_requests_total{{endpoint="{}",status="{}"}}'.format
    assert {name: count for name, count in more.items() if count} == {
        label("news", 422): 4,
        label("news", 400): 4,
        label("(unknown)", 422): 3,
        label("(unknown)", 404): 3,
    }


def test_they_come_and_go_under_load_and_nobody_notices(place: Trunk, api: Client) -> None:
    api.add_adapter("news", "stays", "tuned")
    expected = {name: api.predict(name, TEXTS, logits=True) for name in ("news", "news:stays")}
    done = threading.Event()

    def keep_asking(name: str) -> int:
        count = 0
        while not done.is_set():
            assert same(api.predict(name, TEXTS, logits=True), expected[name])
            count += 1
        return count

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(keep_asking, name) for name in [*expected] * 2]
        try:
            for name in MANY:
                api.add_adapter("news", f"more-{name}", name)
                assert api.predict(f"news:more-{name}", TEXTS[:1])
                api.remove_adapter("news", f"more-{name}")
        finally:
            done.set()
        assert all(asked.result() > len(MANY) for asked in asking)

    def gone() -> bool:
        try:
            api.predict("news:more-urgent", TEXTS[:1])
        except NotFoundError:
            return True
        return False

    assert eventually(gone, "a removed one is gone")
    api.remove_adapter("news", "stays")


@pytest.mark.usefixtures("all_of_them")
def test_what_does_not_fit_is_refused_and_the_others_answer_on(place: Trunk, api: Client) -> None:
    before = api.predict("news:tuned", TEXTS, logits=True)
    trunk = place.system.store.catalog.path(place.news.digest)

    def publish(name: str, change: Any, method: str = "head", seed: int = 8, base: str = "") -> str:
        made = with_evidence(further_model(place.folder / name, trunk, topics(3), method, seed=seed))
        change(made)
        return place.publish(name, made, base or place.base.digest, method=method).ref

    def other_tokeniser(folder: Path) -> None:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["normalizer"] = None
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        write_card(folder, read_card(folder))

    def other_evidence(folder: Path) -> None:
        write_golden(folder, [g | {"logits": [-x for x in g["logits"]]} for g in read_golden(folder)])

    def other_trunk(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        weights["bert.embeddings.LayerNorm.weight"] += 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def as_it_is(folder: Path) -> None: ...

    elsewhere = place.system.artifact("tuned").digest
    for model, error, says in (
        (publish("tokens", other_tokeniser), ModelError, "tokeniser is another one"),
        (publish("dreams", other_evidence), GateRefused, "of its 8 golden answers"),
        (publish("forged", other_trunk), ModelError, "its trunk is another one"),
        (publish("whole", as_it_is, "full"), ModelError, "method full, so it has a trunk of its own"),
        (publish("stranger", as_it_is, base=elsewhere), ModelError, "stranger@1 was trained on tuned@1"),
        ("base", ModelError, "base@1"),
    ):
        with pytest.raises(error, match=says) as caught:
            api.add_adapter("news", "c", model)
        assert caught.value.hint
    with pytest.raises(ConflictError, match="an adapter 'urgent' already"):
        api.add_adapter("news", "urgent", "urgent")
    assert [adapter.name for adapter in api.adapters("news")] == sorted(MANY)
    assert same(api.predict("news:tuned", TEXTS, logits=True), before)


@pytest.mark.usefixtures("all_of_them")
def test_a_new_replica_answers_with_them_and_so_does_another_model_of_the_trunk(place: Trunk, api: Client) -> None:
    before = {name: api.predict(f"news:{name}", TEXTS, logits=True) for name in MANY}
    place.serve(place.news)
    assert all(same(api.predict(f"news:{name}", TEXTS, logits=True), found) for name, found in before.items())
    place.serve(place.system.artifact("names"))
    assert all(same(api.predict(f"news:{name}", TEXTS, logits=True), found) for name, found in before.items())
    assert [adapter.answers for adapter in api.adapters("news")] == [True] * len(MANY)
    place.serve(place.system.artifact("tuned"))
    with pytest.raises(NotFoundError, match="no adapter 'urgent'"):
        eventually(lambda: api.predict("news:urgent", TEXTS[:1]) and None, "it answers no more", 10)
    assert not any(adapter.answers for adapter in api.adapters("news"))
    of_tuned = place.further("of-tuned", topics(2), "head", base=place.system.artifact("tuned").digest)
    with pytest.raises(ModelError, match="its trunk is another one"):
        api.add_adapter("news", "of-tuned", of_tuned.ref)
    place.serve(place.news)


def test_no_more_are_taken_than_the_memory_set_aside_holds(place: Trunk, api: Client) -> None:
    place.serve(place.news, adapters_mib=0)
    with pytest.raises(ModelError, match="the adapter alone needs 1 MiB, and 0 MiB are set aside") as caught:
        api.add_adapter("news", "urgent", "urgent")
    assert "adapters_mib=1" in caught.value.hint
    assert api.adapters("news") == []
    place.serve(place.news)


def test_an_engine_that_takes_none_names_those_that_do(place: Trunk, api: Client) -> None:
    folder = place.folder / "small"
    served_model(folder)
    export(folder, folder / "model.onnx")
    write_card(folder, {**read_card(folder), "engine": "onnx", "reference": {}})
    place.serve(place.publish("small", folder, place.news.digest))
    with pytest.raises(ModelError, match="onnx engine takes no adapters") as caught:
        api.add_adapter("news", "urgent", "urgent")
    assert "torch" in caught.value.hint
    place.serve(place.news)


def test_the_command_line_adds_and_asks(
    place: Trunk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMO_URL", place.url)
    monkeypatch.setenv("LLMO_KEY", place.key)
    assert commands.run(["adapters", "news", "--add", "urgent=urgent@1"]) == 0
    assert "news:urgent" in capsys.readouterr().out
    assert commands.run(["predict", "news:urgent", TEXTS[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] in ("topic0", "topic1")
    assert commands.run(["predict", "news:other", TEXTS[0]]) == InputError.exit_code
    assert "it has: urgent" in capsys.readouterr().err
    assert commands.run(["adapters", "news", "--remove", "urgent", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_from_training_to_a_verified_answer_of_one_trunk(tmp_path: Path) -> None:
    """Real jobs: two models of one base behind one endpoint, and the one that was added is verified as it answers."""
    project(tmp_path / "p")
    how: dict[str, Any] = {"model": str(tmp_path / "p" / "base"), "epochs": 2.0, "max_length": 32}
    with System(Settings(home=tmp_path / "home")) as system:
        data = sdk.Dataset.load(tmp_path / "p" / "tickets.csv", name="t", text="body", label="queue", api=system)
        first = sdk.train(data, name="first", method="head", **how)
        second = sdk.train(data, name="second", method="lora", seed=2, **how)
        deployed = sdk.deploy(first, "t", cores=1)
        deployed.add_adapter("second", second)
        with pytest.raises(ModelError, match="over a BertForSequenceClassification"):
            deployed.add_adapter("poet", tiny_adapter(tmp_path / "poet"))
        assert [(adapter.base, adapter.answers) for adapter in deployed.adapters()] == [
            (second.artifact.inputs["model"], True)
        ]
        golden = system.golden(second.artifact.digest)
        with gateway(system) as door:
            heard = door.heard("t:second", golden)
            for name, asked in (("second@1", golden), ("first@1", system.golden(first.artifact.digest))):
                told = door.heard(name, asked)
                assert [item["input_ids"] for item in told] == [item["input_ids"] for item in asked]
            assert (system.awake("second@1").name, system.awake("first@1").name) == ("t", "t")
        job = system.submit("verify", {"heard": heard}, {"model": second.artifact.digest}, name="second-verify")
        eventually(lambda: system.job(job.id).state.ended, "it is verified")
        passed = {check["name"] for check in (system.job(job.id).result or {})["checks"] if check["passed"]}
        assert {"endpoint token ids", "endpoint logits", "endpoint answers"} <= passed
        texts = [item["text"] for item in golden]
        answers = system.predict("t:second", texts, logits=True)
        assert same(system.predict("second@1", texts, logits=True), answers)
        assert same(system.predict("first@1", texts, logits=True), system.predict("t", texts, logits=True))
        for answer, item in zip(answers, golden, strict=True):
            assert np.abs(np.array(answer["logits"]) - np.array(item["logits"])).max() < 1e-4
