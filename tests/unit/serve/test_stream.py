"""The gateway's end of a generation: order, errors, taking back, and a client that does not read."""

from __future__ import annotations

import asyncio

import pytest

from llmo.errors import DeadlineError, InputError
from llmo.serve.stream import UNREAD_BYTES, Stream

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Told:
    def __init__(self) -> None:
        self.taken_back = 0
        self.over = 0
        self.stream = Stream(self._take_back, self._over)

    def _take_back(self) -> None:
        self.taken_back += 1

    def _over(self) -> None:
        self.over += 1


async def test_frames_come_in_order_and_the_end_needs_no_taking_back() -> None:
    told = Told()
    waiting = asyncio.create_task(told.stream.next())
    await asyncio.sleep(0)
    told.stream.put({"delta": [1]}, 10)
    told.stream.put({"delta": [2]}, 10)
    told.stream.put({"done": {}}, 10)
    assert [await waiting, await told.stream.next(), await told.stream.next()] == [
        {"delta": [1]},
        {"delta": [2]},
        {"done": {}},
    ]
    told.stream.close()
    assert (told.taken_back, told.over) == (0, 1)


async def test_an_error_instead_of_the_first_frame_and_one_behind_others() -> None:
    told = Told()
    told.stream.fail(InputError("bad"))
    with pytest.raises(InputError):
        await told.stream.begun()
    later = Told()
    later.stream.put({"delta": [1]}, 10)
    later.stream.fail(InputError("bad"))
    await later.stream.begun()
    assert await later.stream.next() == {"delta": [1]}
    with pytest.raises(InputError):
        await later.stream.next()
    later.stream.put({"delta": [2]}, 10)
    with pytest.raises(InputError):
        await later.stream.next()
    assert later.over == 1


async def test_closing_early_takes_the_call_back_once() -> None:
    told = Told()
    told.stream.put({"delta": [1]}, 10)
    told.stream.close()
    told.stream.close()
    assert (told.taken_back, told.over) == (1, 1)


async def test_a_client_that_reads_nothing_is_cut_off_at_a_bound() -> None:
    told = Told()
    frames = 0
    while told.over == 0:
        told.stream.put({"delta": [frames]}, 1 << 16)
        frames += 1
        assert frames <= 2 + (UNREAD_BYTES >> 16)
    assert told.taken_back == 1
    for _ in range(frames - 1):
        await told.stream.next()
    with pytest.raises(DeadlineError, match="slowly"):
        await told.stream.next()


async def test_one_that_reads_may_take_any_amount() -> None:
    told = Told()
    for n in range(100):
        told.stream.put({"delta": [n]}, UNREAD_BYTES // 2)
        assert await told.stream.next() == {"delta": [n]}
    assert told.over == 0
