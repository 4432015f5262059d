"""A replica's connections: what one call does, or whose end it is, is nothing to the others."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from llmo.errors import LLMOError
from llmo.serve import calls
from llmo.serve.connection import Replica
from llmo.serve.session import GenerationSession, Session


class Holding:
    """A pipeline that begins every answer and ends none; `trips` over a text."""

    broken = None

    def __init__(self) -> None:
        self.held: list[calls.Call] = []
        self.cancelled: list[calls.Call] = []

    def submit(self, call: calls.Call) -> None:
        if "trips" in str(call.ask.inputs[0].messages):
            raise RecursionError
        self.held.append(call)
        call.hear([calls.Part(0, "x" * 1000, None, None, [1])])

    def cancel(self, call: calls.Call) -> None:
        self.cancelled.append(call)

    def stats(self) -> dict[str, Any]:
        return {}


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


def predict(*texts: str) -> dict[str, Any]:
    return {"op": "predict", "texts": list(texts), "deadline": None, "tenant": ""}


def run(tmp_path: Path, body: Any) -> None:
    async def go() -> None:
        pipeline, sessions = Holding(), set[Session]()
        path = str(tmp_path / "s")

        def session() -> GenerationSession:
            return GenerationSession(pipeline, 30.0, sessions)  # type: ignore[arg-type]

        server = await asyncio.get_running_loop().create_unix_server(session, path)
        replica = Replica(f"unix:{path}")
        try:
            await body(pipeline, sessions, replica)
        finally:
            server.close()
            for one in sessions:
                one.transport.abort()

    asyncio.run(go())


def test_nothing_is_kept_of_a_call_that_was_cancelled(tmp_path: Path) -> None:
    async def body(pipeline: Holding, sessions: set[GenerationSession], replica: Replica) -> None:
        for number in range(1, 4):
            task = asyncio.create_task(replica.call(predict("a")))
            await until(lambda n=number: len(pipeline.held) == n)
            task.cancel()
            await until(lambda n=number: len(pipeline.cancelled) == n)
        [session] = sessions
        await until(lambda: not session._heard)
        assert (session._calls, session._whole) == ({}, {})

    run(tmp_path, body)


def test_a_call_that_cannot_be_taken_ends_itself_only(tmp_path: Path) -> None:
    async def body(pipeline: Holding, sessions: set[GenerationSession], replica: Replica) -> None:
        other = asyncio.create_task(replica.call(predict("a")))
        await until(lambda: pipeline.held)
        with pytest.raises(LLMOError, match="cannot take this request"):
            await replica.call(predict("this trips it"))
        assert not other.done()
        assert pipeline.cancelled == []
        other.cancel()

    run(tmp_path, body)
