"""More endpoints than fit: requests wait while they change places, and a kill of the server changes nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from llmo.kernel import service
from llmo.kernel.submit import submit
from llmo.settings import Settings
from llmo.system import System
from llmo.tasks.card import read_card
from support.crashes import Server, until
from support.serving import deploy, served_model

NAMES = ("one", "two")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with one core, on which two endpoints of one core each are deployed; the second one is asleep."""
    folder = tmp_path_factory.mktemp("paging")
    with System(Settings(home=folder / "home", cores=1)) as system:
        for seed, name in enumerate(NAMES):
            made = served_model(folder / name, seed=seed)
            model = system.save(made, name, read_card(made))
            spec = deploy() | {"endpoint": name}
            job = submit(system.store, system.devices(), "serve", spec, {"model": model.digest}, name=name)
        service.announce(system.store, job)
        service.sleep(system.store, job)
    running = Server(folder / "home", LLMO_CORES="1")
    yield running
    if running.alive:
        assert running.stop() == 0


def client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {server.key}"}, timeout=60)


def endpoints(server: Server) -> dict[str, Any]:
    with client(server) as http:
        return {found["name"]: found for found in http.get("/v1/endpoints").json()}


def states(server: Server) -> list[str]:
    found = endpoints(server)
    return [found[name]["state"] if name in found else "" for name in NAMES]


def predict(http: httpx.Client, name: str, seconds: float = 50.0) -> tuple[int, Any]:
    answer = http.post(f"/v1/endpoints/{name}/predict", json={"text": "goal", "deadline_seconds": seconds})
    return answer.status_code, answer.json().get("model") or answer.json()["error"]["code"]


def test_two_endpoints_in_the_room_of_one_answer_everybody(server: Server) -> None:
    until(lambda: states(server) == ["up", "asleep"], "the first to be up")

    def ask(number: int) -> list[tuple[int, Any]]:
        """The same as the others, so that all want to go there and back together."""
        with client(server) as http:
            return [predict(http, name) for name in reversed(NAMES)]

    with client(server) as http:
        assert predict(http, "two", 0.05) == (504, "deadline")
        assert states(server)[1] == "waking", "it wakes all the same"
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, range(6)))
        assert answers == [[(200, "two@1"), (200, "one@1")]] * 6
        slept = endpoints(server)["two"]
        assert (slept["state"], slept["address"]) == ("asleep", None)
        assert slept["waiting"].startswith("asleep: gave way to endpoint one (job ")
        assert slept["since"] > slept["created_at"]
        text = http.get("/metrics").text
    for name in NAMES:
        assert f'llmo_wake_seconds_count{{endpoint="{name}"}} 1.0' in text


def test_after_a_kill_of_the_server_it_still_sleeps_and_wakes(server: Server) -> None:
    with client(server) as http:
        assert http.delete("/v1/endpoints/one").status_code == 204
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()
    server.start()
    assert states(server) == ["", "asleep"]
    with client(server) as http:
        assert predict(http, "two") == (200, "two@1")
    assert "Traceback" not in server.complaints()
