"""Frames over real unix sockets: cut anywhere, too large, cancelled, and a peer that goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmo.errors import BusyError, InputError, TooLargeError, UnreachableError
from llmo.serve import protocol
from llmo.serve.protocol import Frames, Link, ReplicaGone, answers_frame, error_frame, frame, predict_once

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Collector(Frames):
    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Any] = []

    def received(self, data: bytes) -> None:
        self.frames.append(json.loads(data))


TEXT = st.text(st.characters(codec=None, exclude_categories=[]))  # lone surrogates as well


@given(st.lists(TEXT, max_size=8), st.lists(st.integers(1, 40), max_size=60))
def test_frames_survive_any_cutting_of_the_stream(texts: list[str], cuts: list[int]) -> None:
    stream = b"".join(frame({"texts": [text]}) for text in texts)
    collector = Collector()
    for cut in [*cuts, len(stream)]:
        collector.data_received(stream[:cut])
        stream = stream[cut:]
    assert collector.frames == [{"texts": [text]} for text in texts]


def test_a_frame_over_the_limit_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "MAX_FRAME", 1 << 10)
    with pytest.raises(TooLargeError):
        answers_frame(1, b"x" * 2000)


class Peer(Frames):
    """A replica as scripted by the test."""

    def __init__(self, reply: Callable[[Peer, dict[str, Any]], None], said: list[dict[str, Any]]) -> None:
        super().__init__()
        self._reply = reply
        self._said = said

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(frame({"hello": 1, "deadline_seconds": 5.0}))

    def received(self, data: bytes) -> None:
        body = json.loads(data)
        self._said.append(body)
        self._reply(self, body)


@asynccontextmanager
async def peer(
    tmp_path: Path, reply: Callable[[Peer, dict[str, Any]], None]
) -> AsyncIterator[tuple[str, list[dict[str, Any]]]]:
    said: list[dict[str, Any]] = []
    path = tmp_path / "s"
    server = await asyncio.get_running_loop().create_unix_server(lambda: Peer(reply, said), str(path))
    async with server:
        yield f"unix:{path}", said


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.002)


async def test_calls_are_answered_in_any_order(tmp_path: Path) -> None:
    held: list[int] = []

    def reply(to: Peer, body: dict[str, Any]) -> None:
        held.append(body["id"])
        if len(held) == 3:
            to.transport.write(answers_frame(held[2], b'["c"]') + error_frame(held[0], BusyError("no", retry_after=2)))
            to.transport.write(frame({"id": held[1], "stats": {"queue": 1}}))

    async with peer(tmp_path, reply) as (address, _):
        link = await Link.connect(address)
        assert link.deadline_seconds == 5.0
        calls = [asyncio.create_task(link.call({"op": "predict"})) for _ in range(3)]
        assert await calls[2] == b'["c"]'
        assert (await calls[1])["stats"] == {"queue": 1}
        with pytest.raises(BusyError) as caught:
            await calls[0]
        assert caught.value.extra["retry_after"] == 2
        assert link.outstanding == 0
        link.close()


async def test_cancelling_a_call_takes_it_back(tmp_path: Path) -> None:
    async with peer(tmp_path, lambda to, body: None) as (address, said):
        link = await Link.connect(address)
        call = asyncio.create_task(link.call({"op": "predict"}))
        await until(lambda: len(said) == 1)
        call.cancel()
        await until(lambda: len(said) == 2)
        assert said[1] == {"op": "cancel", "id": said[0]["id"]}
        assert link.outstanding == 0
        link.close()


async def test_generations_stream_beside_calls_and_end(tmp_path: Path) -> None:
    def reply(to: Peer, body: dict[str, Any]) -> None:
        if body["op"] == "generate":
            for text in ("a", "b"):
                to.transport.write(frame({"id": body["id"], "delta": [{"choice": 0, "text": text}]}))
        elif body["op"] == "predict":
            to.transport.write(answers_frame(body["id"], b"[]"))
            to.transport.write(frame({"id": 1, "done": {"prompt": 1}}))

    over: list[str] = []
    async with peer(tmp_path, reply) as (address, _):
        link = await Link.connect(address)
        stream = link.open({"op": "generate"}, lambda: over.append("first"))
        assert [(await stream.next())["delta"][0]["text"] for _ in range(2)] == ["a", "b"]
        assert link.outstanding == 1
        assert await link.call({"op": "predict"}) == b"[]"
        assert (await stream.next())["done"] == {"prompt": 1}
        assert over == ["first"]
        assert link.outstanding == 0
        link.close()


async def test_a_generation_is_taken_back_refused_or_lost(tmp_path: Path) -> None:
    def reply(to: Peer, body: dict[str, Any]) -> None:
        match body.get("mood"):
            case "refuse":
                to.transport.write(error_frame(body["id"], InputError("too long")))
            case "leave":
                to.transport.write(error_frame(body["id"], UnreachableError("leaving")))
            case "die":
                to.transport.abort()

    async with peer(tmp_path, reply) as (address, said):
        link = await Link.connect(address)
        link.open({"op": "generate"}, lambda: None).close()
        await until(lambda: len(said) == 2)
        assert said[1] == {"op": "cancel", "id": said[0]["id"]}
        for mood, expected in (("refuse", InputError), ("leave", ReplicaGone), ("die", ReplicaGone)):
            stream = link.open({"op": "generate", "mood": mood}, lambda: None)
            with pytest.raises(expected):
                await stream.begun()
        assert link.outstanding == 0
        with pytest.raises(ReplicaGone):
            link.open({"op": "generate"}, lambda: None)


async def test_a_peer_that_goes_or_leaves_is_gone(tmp_path: Path) -> None:
    async with peer(tmp_path, lambda to, body: to.transport.abort()) as (address, _):
        link = await Link.connect(address)
        with pytest.raises(ReplicaGone):
            await link.call({"op": "predict"})
        assert link.closed
        with pytest.raises(ReplicaGone):
            await link.call({"op": "predict"})
    leaving = UnreachableError("leaving")
    async with peer(tmp_path, lambda to, body: to.transport.write(error_frame(body["id"], leaving))) as (address, _):
        link = await Link.connect(address)
        with pytest.raises(ReplicaGone, match="leaving"):
            await link.call({"op": "predict"})
        link.close()


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(ReplicaGone):
        await Link.connect(f"unix:{tmp_path / 'none'}")
    with pytest.raises(UnreachableError):
        await asyncio.to_thread(predict_once, f"unix:{tmp_path / 'none'}", ["a"])
    with pytest.raises(UnreachableError, match="not the address"):
        predict_once("http://x", ["a"])


async def test_predict_once_hears_answers_errors_and_hang_ups(tmp_path: Path) -> None:
    def reply(to: Peer, body: dict[str, Any]) -> None:
        match body["texts"][0]:
            case "good":
                to.transport.write(answers_frame(body["id"], b'[{"label":"x"}]'))
            case "bad":
                to.transport.write(error_frame(body["id"], InputError("bad text", where="texts[0]")))
            case _:
                to.transport.abort()

    async with peer(tmp_path, reply) as (address, said):
        assert await asyncio.to_thread(predict_once, address, ["good"], logits=True) == [{"label": "x"}]
        assert said[0]["logits"] is True
        with pytest.raises(InputError, match="bad text"):
            await asyncio.to_thread(predict_once, address, ["bad"])
        with pytest.raises(UnreachableError):
            await asyncio.to_thread(predict_once, address, ["leave"])
