"""Serving end to end: a real HTTP server, the real store, real replicas, and whatever clients may send."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from llmo.errors import GateRefused, UnreachableError
from llmo.guard.access import check_declared, declare
from llmo.guard.limits import Quota
from llmo.serve.gateway import Gateway, include_gateway
from llmo.serve.protocol import predict_once
from llmo.serve.server import HttpServer
from llmo.store import Store
from llmo.tasks.card import read_golden, write_golden
from llmo.types import Needs
from support.serving import ProcessReplica, ThreadReplica, deploy, direct, eventually, served_model
from support.tiny import text_rows

TEXTS = [row["text"] for row in text_rows(40, seed=5, longest=60)]
PREDICT = "/v1/endpoints/topics/predict"


@dataclass
class Site:
    """A running gateway over a store of its own."""

    url: str
    port: int
    store: Store
    gateway: Gateway
    keys: dict[str, str]
    job: int

    def client(self, role: str = "predict") -> httpx.Client:
        headers = {"authorization": f"Bearer {self.keys[role]}"} if role else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def point(self, address: str | None, model_ref: str = "m@1", state: str = "up") -> None:
        self.store.endpoints.set(
            "topics", job=self.job, model="sha256:0", model_ref=model_ref, state=state, address=address
        )
        router = self.gateway.router
        eventually(
            lambda: any((e.name, e.address, e.state) == ("topics", address, state) for e in router.endpoints()),
            f"the gateway hears of {address}",
        )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "one": served_model(folder / "one", seed=1),
        "two": served_model(folder / "two", seed=2),
        "tags": served_model(folder / "tags", "token-classification"),
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    store = Store.open(tmp_path_factory.mktemp("home") / "home")
    app = FastAPI()
    gateway = include_gateway(app, store)
    for path in ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"):
        declare(app.routes, path, "public")
    check_declared(app)
    keys = {role: store.keys.create("tests", role)[1] for role in ("predict", "member", "admin")}
    job = store.jobs.insert(op="serve", spec={}, inputs={}, needs=Needs(), service=True)
    with HttpServer(app, request_timeout=0.5) as server:
        yield Site(server.url, server.port, store, gateway, keys, job.id)
    store.close()


@pytest.fixture
def one(site: Site, models: dict[str, Path]) -> Iterator[ThreadReplica]:
    with ThreadReplica(models["one"]) as replica:
        site.point(replica.address)
        yield replica


def predict(client: httpx.Client, texts: list[str], **more: Any) -> list[dict[str, Any]]:
    answer = client.post(PREDICT, json={"texts": texts, **more})
    assert answer.status_code == 200, answer.text
    answers: list[dict[str, Any]] = answer.json()["answers"]
    return answers


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(n)` in threads at once; the first thing that goes wrong is raised here."""
    wrong: list[BaseException] = []

    def caught(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=caught, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


def test_answers_over_http_equal_the_model_run_directly(
    site: Site, one: ThreadReplica, models: dict[str, Path]
) -> None:
    with site.client() as client:
        answers = predict(client, TEXTS, logits=True)
        single = client.post(PREDICT, json={"text": TEXTS[0]}).json()
    expected = direct(models["one"], [a["input_ids"] for a in answers])
    for answer, logits in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer["logits"], logits, atol=1e-5)
    assert single["endpoint"] == "topics"
    assert single["model"] == "m@1"
    assert single["answers"][0]["label"] == answers[0]["label"]
    assert sum(single["answers"][0]["scores"].values()) == pytest.approx(1.0)


def test_many_clients_at_once_each_get_their_own_answers(site: Site, one: ThreadReplica) -> None:
    with site.client() as client:
        expected = predict(client, TEXTS)

    def work(number: int) -> None:
        with site.client() as client:
            for step in range(15):
                at = (number * 7 + step * 3) % len(TEXTS)
                (answer,) = predict(client, [TEXTS[at]])
                assert answer["label"] == expected[at]["label"]
                assert answer["score"] == pytest.approx(expected[at]["score"], abs=1e-5)

    in_threads(12, work)


def test_tags_carry_offsets_into_the_text_as_sent(site: Site, models: dict[str, Path]) -> None:
    text = "👍🏽 the alice 北京 in Zürich 😀 bob smith"
    with ThreadReplica(models["tags"]) as replica:
        site.point(replica.address)
        with site.client() as client:
            (answer,) = predict(client, [text])
    assert answer["entities"]
    for entity in answer["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"]


@pytest.mark.parametrize(
    ("role", "path", "status"),
    [
        ("", PREDICT, 401),
        ("predict", PREDICT, 200),
        ("admin", PREDICT, 200),
        ("", "/metrics", 401),
        ("predict", "/metrics", 403),
        ("member", "/metrics", 200),
        ("", "/healthz", 200),
        ("", "/readyz", 200),
        ("", "/openapi.json", 200),
    ],
)
def test_who_may_do_what(site: Site, one: ThreadReplica, role: str, path: str, status: int) -> None:
    with site.client(role) as client:
        answer = client.post(path, json={"text": "goal"}) if path == PREDICT else client.get(path)
    assert answer.status_code == status
    if status in (401, 403):
        assert answer.json()["error"]["hint"]


def test_keys_wrong_revoked_and_in_the_other_header(site: Site, one: ThreadReplica) -> None:
    key, secret = site.store.keys.create("tests", "predict")
    with httpx.Client(base_url=site.url) as client:

        def status(headers: dict[str, str]) -> int:
            return client.post(PREDICT, json={"text": "goal"}, headers=headers).status_code

        assert status({"authorization": "Bearer llmo_" + "x" * 43}) == 401
        assert status({"x-api-key": secret}) == 200
        site.store.keys.revoke(key.id)
        site.gateway.access.forget()
        assert status({"x-api-key": secret}) == 401


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 422, "empty"),
        (b'{"text": "a"', 422, "not valid JSON"),
        (b"[" * 100_000, 422, "too deeply"),
        (b'{"text": "a", "deadline_seconds": NaN}', 422, "NaN"),
        (b'{"text": "a", "text": "b"}', 422, "twice"),
        (b'{"text": "\\ud83d"}', 422, "surrogate"),
        (b'{"text": "\xff"}', 422, "UTF-8"),
        (b'{"text": "  "}', 422, "text is empty"),
        (b'{"texts": ["goal", ""]}', 422, "text is empty"),
        (b'{"texts": []}', 422, "at least one"),
        (b'{"txt": "goal"}', 422, "did you mean"),
        (json.dumps({"texts": ["goal"] * 513}).encode(), 413, "limit is 512"),
        (json.dumps({"text": "x" * (1 << 20)}).encode(), 413, "over the limit"),
    ],
)
def test_a_bad_body_is_explained(site: Site, one: ThreadReplica, body: bytes, status: int, says: str) -> None:
    with site.client() as client:
        answer = client.post(PREDICT, content=body)
        assert answer.status_code == status
        assert says in answer.json()["error"]["what"]
        assert predict(client, ["goal"])


def test_json_is_read_whatever_its_content_type_says(site: Site, one: ThreadReplica) -> None:
    with site.client() as client:
        answer = client.post(PREDICT, content=b'{"text": "goal"}', headers={"content-type": "text/plain"})
    assert answer.status_code == 200


def test_a_huge_body_is_cut_off_early(site: Site, one: ThreadReplica) -> None:
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        while sent < 300 << 20:
            sent += 1 << 16
            yield b"x" * (1 << 16)

    with site.client() as client:
        with contextlib.suppress(httpx.WriteError, httpx.ReadError):
            assert client.post(PREDICT, content=pieces()).status_code == 413
        assert sent < 100 << 20
        assert client.post(PREDICT, content=b"x" * (2 << 20)).status_code == 413


def test_a_half_sent_request_is_closed(site: Site) -> None:
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        connection.sendall(b"POST /v1/endpoints/topics/predict HTTP/1.1\r\nhost: x\r\nauth")
        assert b"408" in connection.recv(4096)
        assert connection.recv(4096) == b""


def test_unknown_and_starting_endpoints(site: Site, one: ThreadReplica) -> None:
    with site.client() as client:
        missing = client.post("/v1/endpoints/topix/predict", json={"text": "goal"})
        assert missing.status_code == 404
        assert "did you mean 'topics'" in missing.json()["error"]["what"]
        assert client.get(PREDICT).status_code == 405
        site.point(None, state="starting")
        starting = client.post(PREDICT, json={"text": "goal"})
    assert starting.status_code == 503
    assert "starting" in starting.json()["error"]["what"]
    assert starting.headers["retry-after"] == "1"


class Stuffed:
    """A replica whose engine is busy with a long batch, and whose queue of two is free."""

    def __init__(self, site: Site, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from llmo.engines.torch import TorchEngine

        self.go = threading.Event()
        self.entered = threading.Event()
        self.ran = 0
        run = TorchEngine.run

        def held(engine: TorchEngine, requests: Any) -> Any:
            if any(len(r.input_ids) > 40 for r in requests):
                self.entered.set()
                assert self.go.wait(60)
            self.ran += len(requests)
            return run(engine, requests)

        self.replica = ThreadReplica(model, deploy(queue=2)).start()
        monkeypatch.setattr(TorchEngine, "run", held)
        self.ran = 0
        site.point(self.replica.address)
        self.site = site
        self.blocker = threading.Thread(target=self._block)
        self.blocker.start()
        assert self.entered.wait(60)

    def _block(self) -> None:
        with self.site.client() as client:
            predict(client, ["goal " * 50])

    def waiting(self) -> int:
        queue: int = predict_stats(self.replica)["queue"]
        return queue

    def release(self) -> None:
        self.go.set()
        self.blocker.join()
        self.replica.stop()


def predict_stats(replica: ThreadReplica) -> dict[str, Any]:
    from llmo.serve.protocol import _read_frame, frame, socket_path

    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(socket_path(replica.address))
        with connection.makefile("rwb") as stream:
            _read_frame(stream.read)
            stream.write(frame({"id": 1, "op": "stats"}))
            stream.flush()
            stats: dict[str, Any] = _read_frame(stream.read)["stats"]
            return stats


@pytest.fixture
def stuffed(site: Site, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Stuffed]:
    busy = Stuffed(site, models["one"], monkeypatch)
    yield busy
    busy.release()


def hang_up(site: Site, texts: list[str]) -> socket.socket:
    """A request whose client can leave when it likes."""
    body = json.dumps({"texts": texts}).encode()
    head = f"POST {PREDICT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {site.keys['predict']}\r\n"
    connection = socket.create_connection(("127.0.0.1", site.port), timeout=60)
    connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def test_a_full_queue_answers_429_and_a_client_that_leaves_makes_room(site: Site, stuffed: Stuffed) -> None:
    with site.client() as client:
        leaving = hang_up(site, ["goal", "coach"])
        eventually(lambda: stuffed.waiting() == 2, "two texts wait")
        full = client.post(PREDICT, json={"text": "goal"})
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["extra"]["retry_after"] > 0
        leaving.close()
        eventually(lambda: stuffed.waiting() == 0, "the place is free again")
        staying = threading.Thread(target=predict, args=(client, ["team"]))
        staying.start()
        eventually(lambda: stuffed.waiting() == 1, "the next one waits there")
        stuffed.go.set()
        staying.join()
    assert stuffed.ran == 2, "nothing was run for the one that left"


def test_a_deadline_is_kept_while_the_engine_is_busy(site: Site, stuffed: Stuffed) -> None:
    with site.client() as client:
        began = time.monotonic()
        late = client.post(PREDICT, json={"text": "goal", "deadline_seconds": 0.2})
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "deadline"
        assert time.monotonic() - began >= 0.2
    eventually(lambda: stuffed.waiting() == 0, "it left the queue")


def test_a_quota_is_the_keys_own(site: Site, one: ThreadReplica) -> None:
    key, secret = site.store.keys.create("greedy", "predict")
    site.gateway.quotas.set(key.id, Quota(rate=0.001, burst=3))
    with httpx.Client(base_url=site.url, headers={"x-api-key": secret}) as greedy, site.client() as other:
        assert greedy.post(PREDICT, json={"texts": ["goal"] * 3}).status_code == 200
        over = greedy.post(PREDICT, json={"text": "goal"})
        assert over.status_code == 429
        assert int(over.headers["retry-after"]) > 1
        assert greedy.post("/v1/embeddings", json={"model": "topics", "input": "goal"}).status_code == 429
        assert predict(other, ["goal"] * 10)


def test_a_swap_under_load_fails_nobody(site: Site, models: dict[str, Path]) -> None:
    """Pointer first, then the old replica is asked to stop: three times back and forth under continuous load."""
    stop = threading.Event()
    seen: list[str] = []
    bad: list[str] = []

    def load(number: int) -> None:
        with site.client() as client:
            step = number
            while not stop.is_set():
                answer = client.post(PREDICT, json={"texts": TEXTS[step % 30 : step % 30 + 1 + number]})
                (seen if answer.status_code == 200 else bad).append(
                    answer.json()["model"] if answer.status_code == 200 else answer.text
                )
                step += 1

    old = ThreadReplica(models["one"]).start()
    site.point(old.address, "m@1")
    loaders = [threading.Thread(target=load, args=(n,)) for n in range(6)]
    for loader in loaders:
        loader.start()
    try:
        for version in (2, 3, 4):
            before = len(seen)
            eventually(lambda before=before: len(seen) > before + 50, "load flows")
            new = ThreadReplica(models["two" if version % 2 == 0 else "one"]).start()
            site.store.endpoints.point("topics", site.job, address=new.address, model_ref=f"m@{version}")
            old.stop()  # at once: the gateway may not have heard of the new one yet
            old = new
            eventually(lambda version=version: seen[-1] == f"m@{version}", "the new version answers")
    finally:
        stop.set()
        for loader in loaders:
            loader.join()
        old.stop()
    assert bad == []
    assert {"m@1", "m@2", "m@3", "m@4"} <= set(seen)


def test_a_killed_replica_is_a_clear_503_until_another_takes_over(site: Site, models: dict[str, Path]) -> None:
    with ProcessReplica(models["one"]) as first, site.client() as client:
        site.point(first.address)
        assert predict(client, ["goal"])
        first.kill()
        broken = client.post(PREDICT, json={"text": "goal"})
        assert broken.status_code == 503
        error = broken.json()["error"]
        assert error["code"] == "unreachable"
        assert f"llmo logs {site.job}" in error["hint"]
        with ThreadReplica(models["two"]) as second:
            assert not Path(first.address.removeprefix("unix:")).exists(), "a new replica sweeps up after dead ones"
            site.store.endpoints.point("topics", site.job, address=second.address)
            eventually(lambda: client.post(PREDICT, json={"text": "goal"}).status_code == 200, "it recovers")


def test_two_replicas_share_the_load_and_cover_for_each_other(site: Site, models: dict[str, Path]) -> None:
    with ThreadReplica(models["one"]) as a, ProcessReplica(models["one"]) as b, site.client() as client:
        site.point(f"{a.address},{b.address}")

        def work(number: int) -> None:
            with site.client() as own:
                for _ in range(10):
                    predict(own, TEXTS)

        in_threads(4, work)
        with site.client("member") as member:
            assert 'llmo_replicas{endpoint="topics"} 2.0' in member.get("/metrics").text
        assert 0 < predict_stats(a)["answered"] < 41
        b.kill()
        for _ in range(5):
            assert predict(client, TEXTS)


def test_the_replica_stops_clean(models: dict[str, Path]) -> None:
    replica = ThreadReplica(models["one"]).start()
    path = Path(replica.address.removeprefix("unix:"))
    assert path.is_socket()
    assert path.parent.stat().st_mode & 0o077 == 0
    assert predict_once(replica.address, ["goal"])[0]["label"]
    replica.stop()
    assert not path.exists()
    assert replica.result is not None
    assert replica.result["answered"] == 2  # the self-test's and ours
    with pytest.raises(UnreachableError):
        predict_once(replica.address, ["goal"])


@pytest.mark.parametrize("damage", ["tokens", "answers"])
def test_a_model_that_does_not_repeat_its_evidence_never_gets_ready(tmp_path: Path, damage: str) -> None:
    model = served_model(tmp_path / "m")
    golden = read_golden(model)
    if damage == "tokens":
        golden[3]["input_ids"] = golden[3]["input_ids"][:-1]
    else:
        golden[3]["logits"] = [-x for x in golden[3]["logits"]]
    write_golden(model, golden)
    replica = ThreadReplica(model)
    with pytest.raises(GateRefused):
        replica.start()
    assert replica.address == ""
