"""The router against scripted replicas: choice, retry, and a table that changes or cannot be read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmo.errors import BusyError, DeadlineError, InputError, NotFoundError, StorageError, UnreachableError
from llmo.serve.ask import Ask, Input
from llmo.serve.protocol import Frames, ReplicaGone, answers_frame, error_frame, frame
from llmo.serve.router import Router
from llmo.types import Endpoint

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Fake:
    """A replica that answers with its name, or as `mood` says."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.mood = "answer"
        self.asked = 0
        self.connections = 0
        self.release = asyncio.Event()

    def session(self) -> Frames:
        fake = self

        class Session(Frames):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                super().connection_made(transport)
                fake.connections += 1
                self.transport.write(frame({"hello": 1, "deadline_seconds": 5.0}))

            def connection_lost(self, exc: Exception | None) -> None:
                fake.connections -= 1

            def received(self, data: bytes) -> None:
                import json

                body = json.loads(data)
                if body["op"] in ("predict", "embed", "generate"):
                    fake.asked += 1
                    self._tasks = asyncio.ensure_future(fake.reply(self, body))

        return Session()

    async def reply(self, session: Frames, body: dict[str, Any]) -> None:
        if self.mood == "hold":
            await self.release.wait()
        if self.mood == "die":
            session.transport.abort()
        elif self.mood == "busy":
            session.transport.write(error_frame(body["id"], BusyError("full", retry_after=1.0)))
        elif self.mood == "leave":
            session.transport.write(error_frame(body["id"], UnreachableError("leaving")))
        elif self.mood == "refuse":
            session.transport.write(error_frame(body["id"], InputError("bad")))
        elif body["op"] == "generate":
            session.transport.write(frame({"id": body["id"], "delta": [{"choice": 0, "text": self.name}]}))
            await self.release.wait()
            session.transport.write(frame({"id": body["id"], "done": {}}))
        else:
            session.transport.write(answers_frame(body["id"], b'["%s"]' % self.name.encode()))


class World:
    """A table and the replicas it may name."""

    def __init__(self) -> None:
        self.rows: list[Endpoint] = []
        self.failure: Exception | None = None
        self.wanted = 0
        self.woken: list[str] = []

    def load(self) -> list[Endpoint]:
        if self.failure is not None:
            raise self.failure
        return self.rows

    def want(self, name: str) -> None:
        """As the store does; the scheduler of a test then says when it is up."""
        self.wanted += 1
        self.rows = [replace(row, state="waking") if row.state == "asleep" else row for row in self.rows]

    def came_up(self, name: str, seconds: float) -> None:
        assert seconds >= 0
        self.woken.append(name)

    def point(self, *fakes: Fake, ref: str = "m@1", state: str = "up", **deploy: Any) -> None:
        address = ",".join(f.address for f in fakes) or None
        self.rows = [Endpoint("topics", state, "sha256:0", ref, 3, address=address, deploy=deploy)]


@asynccontextmanager
async def world(tmp_path: Path, refresh_seconds: float = 0.02) -> AsyncIterator[tuple[World, Router, Fake, Fake]]:
    made = World()
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        fakes = [Fake(name, f"unix:{tmp_path / name}") for name in ("a", "b")]
        for fake in fakes:
            path = fake.address.removeprefix("unix:")
            await stack.enter_async_context(await loop.create_unix_server(fake.session, path))
        router = Router(made.load, refresh_seconds=refresh_seconds, want=made.want, woken=made.came_up)
        made.point(fakes[0])
        await stack.enter_async_context(router.running())
        yield made, router, fakes[0], fakes[1]


async def until(true: Any) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.002)


async def test_says_which_model_answered(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, router, _, _):
        reply = await router.predict("topics", ["x"])
        assert (reply.model, reply.answers) == ("m@1", b'["a"]')
        assert router.ready


async def test_unknown_names_are_looked_up_again_and_then_not_found(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, router, a, _):
        with pytest.raises(NotFoundError, match="did you mean 'topics'"):
            await router.predict("topic", ["x"])
        made.rows = [*made.rows, Endpoint("fresh", "up", "sha256:1", "n@1", 4, address=a.address)]
        assert (await router.predict("fresh", ["x"])).model == "n@1"


async def test_an_endpoint_that_is_up_since_a_moment_is_found(tmp_path: Path) -> None:
    async with world(tmp_path, refresh_seconds=3600) as (made, router, a, _):
        made.point(state="starting")
        await router.refresh()
        made.point(a)
        assert (await router.predict("topics", ["x"])).answers == b'["a"]'


async def test_the_least_busy_replica_is_asked(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, router, a, b):
        made.point(a, b)
        await router.refresh()
        a.mood = b.mood = "hold"
        calls = [asyncio.create_task(router.predict("topics", ["x"])) for _ in range(10)]
        await until(lambda: a.asked + b.asked == 10)
        assert (a.asked, b.asked) == (5, 5)
        a.release.set()
        b.release.set()
        assert len(await asyncio.gather(*calls)) == 10


@pytest.mark.parametrize("mood", ["die", "leave", "busy"])
async def test_another_replica_is_asked_when_one_cannot_answer(tmp_path: Path, mood: str) -> None:
    async with world(tmp_path) as (made, router, a, b):
        made.point(a, b)
        await router.refresh()
        a.mood = mood
        for _ in range(4):
            assert (await router.predict("topics", ["x"])).answers == b'["b"]'
        assert a.asked >= 1


async def test_the_retry_uses_the_newest_table(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, router, a, b):
        a.mood = "hold"
        call = asyncio.create_task(router.predict("topics", ["x"]))
        await until(lambda: a.asked == 1)
        made.point(b, ref="m@2")
        a.mood = "die"
        a.release.set()
        reply = await call
        assert (reply.model, reply.answers) == ("m@2", b'["b"]')


async def test_errors_of_the_request_are_not_retried(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, router, a, b):
        made.point(a, b)
        await router.refresh()
        a.mood = b.mood = "refuse"
        with pytest.raises(InputError):
            await router.predict("topics", ["x"])
        assert a.asked + b.asked == 1
        a.mood = b.mood = "busy"
        with pytest.raises(BusyError):
            await router.predict("topics", ["x"])


@pytest.mark.parametrize(("state", "says"), [("up", "no replica"), ("starting", "is starting"), ("down", "no replica")])
async def test_nobody_left_says_what_to_do(tmp_path: Path, state: str, says: str) -> None:
    async with world(tmp_path) as (made, router, a, _):
        a.mood = "die"
        made.point(*([] if state == "starting" else [a]), state=state)
        await router.refresh()
        with pytest.raises(UnreachableError, match=says) as caught:
            await router.predict("topics", ["x"])
        assert caught.value.hint


async def test_a_replica_that_left_the_table_finishes_and_is_then_closed(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, router, a, b):
        a.mood = "hold"
        old = asyncio.create_task(router.predict("topics", ["x"]))
        await until(lambda: a.asked == 1)
        made.point(b, ref="m@2")
        await router.refresh()
        assert (await router.predict("topics", ["x"])).model == "m@2"
        await asyncio.sleep(0.1)  # several refreshes, none of which may close it
        assert a.connections == 1
        a.release.set()
        a.mood = "answer"
        assert (await old).model == "m@1"
        await until(lambda: a.connections == 0)


async def test_a_store_that_cannot_be_read_does_not_stop_requests(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, router, _, _):
        made.failure = StorageError("the disk is gone")
        await until(lambda: not router.ready)
        assert (await router.predict("topics", ["x"])).answers == b'["a"]'
        made.failure = None
        await until(lambda: router.ready)


ASK = Ask([Input(text="x")])


@pytest.mark.parametrize("mood", ["die", "leave", "busy"])
async def test_a_generation_goes_to_another_replica_until_it_has_begun(tmp_path: Path, mood: str) -> None:
    async with world(tmp_path) as (made, router, a, b):
        made.point(a, b)
        await router.refresh()
        a.mood = mood
        for _ in range(3):
            generating = await router.generate("topics", ASK)
            assert (await generating.stream.next())["delta"][0]["text"] == "b"
            generating.stream.close()
        assert a.asked >= 1
        a.mood = "refuse"
        b.mood = "refuse"
        with pytest.raises(InputError):
            await router.generate("topics", ASK)
        with pytest.raises(NotFoundError):
            await router.generate("nothing", ASK)


async def test_streams_count_as_outstanding_until_they_are_over(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, router, a, b):
        made.point(a, b)
        await router.refresh()
        open_ = [await router.generate("topics", ASK) for _ in range(6)]
        assert (a.asked, b.asked) == (3, 3)
        assert [endpoint.name for endpoint in router.endpoints()] == ["topics"]
        for generating in open_[:2]:
            generating.stream.close()
        a.release.set()
        b.release.set()
        for generating in open_[2:]:
            await generating.stream.next()
            assert "done" in await generating.stream.next()
        assert all(replica.outstanding == 0 for replica in router._table["topics"].replicas)


async def test_a_replica_that_goes_in_mid_stream_ends_it(tmp_path: Path) -> None:
    async with world(tmp_path) as (_, router, a, _):
        generating = await router.generate("topics", ASK)
        await generating.stream.next()
        a.mood = "die"
        with pytest.raises(UnreachableError):
            await router.predict("topics", ["x"])
        with pytest.raises(ReplicaGone):
            await generating.stream.next()


async def test_requests_wait_for_an_endpoint_that_is_asleep_and_are_answered(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, router, a, b):
        made.point(state="asleep")
        await router.refresh()
        calls = [asyncio.create_task(router.predict("topics", ["x"])) for _ in range(5)]
        streams = [asyncio.create_task(router.generate("topics", ASK)) for _ in range(2)]
        await until(lambda: made.rows[0].state == "waking")
        assert router.use("topics", b.address).asked == 7
        await router.refresh()
        wanted = made.wanted
        for _ in range(3):
            await router.refresh()
        assert made.wanted == wanted, "it is asked for once, not as long as they wait"
        assert not any(call.done() for call in calls)
        made.point(b, ref="m@2")
        assert {(reply.model, reply.answers) for reply in await asyncio.gather(*calls)} == {("m@2", b'["b"]')}
        generating = await asyncio.gather(*streams)
        assert router.use("topics", b.address).asked == 0
        assert (router.use("topics", b.address).open, router.use("topics", b.address).outstanding) == (True, 2)
        for one in generating:
            one.stream.close()
        assert router.use("topics", b.address).idle
        assert made.woken == ["topics"]
        assert a.asked == 0


async def test_a_request_that_meets_a_replica_as_it_leaves_waits_for_the_next(tmp_path: Path) -> None:
    async with world(tmp_path, refresh_seconds=0.05) as (made, router, a, b):
        a.mood = "leave"
        made.point(state="asleep")  # the router does not know yet
        call = asyncio.create_task(router.predict("topics", ["x"]))
        await until(lambda: made.rows[0].state == "waking")
        assert a.asked == 1
        made.point(state="asleep")  # it slept again before anybody was answered: it is asked for once more
        await until(lambda: made.rows[0].state == "waking")
        made.point(b)
        assert (await call).answers == b'["b"]'


async def test_an_endpoint_that_leaves_is_known_to_have_left_when_its_last_answer_is_given(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, router, a, _):
        generating = await router.generate("topics", ASK)
        made.point(state="asleep")
        await router.refresh()
        assert not router.use("topics", a.address).left
        generating.stream.close()
        assert router.use("topics", a.address).left
        used = router.use("topics", a.address).at
        await router.refresh()
        assert router.use("topics", a.address).left, "also once nobody is connected there"
        assert router.use("topics", a.address).at == used > 0


async def test_waiting_for_an_endpoint_is_bounded_in_time_and_in_number(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, router, a, _):
        made.point(state="asleep", queue=4, deadline_seconds=0.05)
        await router.refresh()
        began = time.time()
        with pytest.raises(DeadlineError, match="was asleep") as late:
            await router.predict("topics", ["x"], deadline=began + 0.1)
        assert late.value.status == 504
        assert time.time() - began >= 0.1
        with pytest.raises(DeadlineError):
            await router.generate("topics", ASK)
        made.point(state="asleep", queue=4)
        await router.refresh()
        first = asyncio.create_task(router.predict("topics", ["x"] * 3))
        await until(lambda: router.use("topics", a.address).asked == 1)
        with pytest.raises(BusyError, match="3 texts or prompts wait") as full:
            await router.predict("topics", ["x"] * 2)
        assert full.value.extra["retry_after"] > 0
        second = asyncio.create_task(router.predict("topics", ["x"]))
        await until(lambda: router.use("topics", a.address).asked == 2)
        second.cancel()
        await until(lambda: router.use("topics", a.address).asked == 1)
        made.point(a)
        assert (await first).answers == b'["a"]'


async def test_waiting_is_bounded_in_bytes_over_all_endpoints(tmp_path: Path) -> None:
    async with world(tmp_path) as (made, router, a, _):
        made.rows = [Endpoint(name, "asleep", "sha256:0", "m@1", 3) for name in ("topics", "mood")]
        await router.refresh()
        large = "x" * (20 << 20)
        waiting = [asyncio.create_task(router.predict("topics", [large])) for _ in range(3)]
        await until(lambda: router.use("topics", a.address).asked == 3)
        for name in ("topics", "mood"):
            with pytest.raises(BusyError, match="requests of 60 MiB wait") as full:
                await router.predict(name, [large])
            assert full.value.extra["retry_after"] > 0
        small = asyncio.create_task(router.embed("topics", ["goal", [5, 6]]))
        await until(lambda: router.use("topics", a.address).asked == 4)
        waiting.pop().cancel()
        await until(lambda: router.use("topics", a.address).asked == 3)
        waiting.append(asyncio.create_task(router.predict("topics", [large])))
        await until(lambda: router.use("topics", a.address).asked == 4)
        made.point(a)
        assert {reply.answers for reply in await asyncio.gather(small, *waiting)} == {b'["a"]'}


@pytest.mark.parametrize(("state", "error"), [("down", UnreachableError), ("", NotFoundError)])
async def test_an_endpoint_that_does_not_come_back_is_not_waited_for(
    tmp_path: Path, state: str, error: type[Exception]
) -> None:
    async with world(tmp_path) as (made, router, _, _):
        made.point(state="asleep")
        await router.refresh()
        call = asyncio.create_task(router.predict("topics", ["x"]))
        await until(lambda: made.rows[0].state == "waking")
        if state:
            made.point(state=state)
        else:
            made.rows = []
        with pytest.raises(error):
            await call
        assert made.woken == []
