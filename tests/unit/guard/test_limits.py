"""Quotas and bodies: what is within passes, what is over is refused and says so."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st

from llmo.errors import BusyError
from llmo.guard.limits import BodyLimit, Quota, Quotas, TokenBucket


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 5)), max_size=60))
def test_a_bucket_never_gives_more_than_its_rate_and_burst(asked: list[tuple[float, int]]) -> None:
    bucket = TokenBucket(Quota(rate=2.0, burst=5.0), now=0.0)
    now = given_out = 0.0
    for gap, amount in asked:
        now += gap
        wait = bucket.take(amount, now)
        assert wait >= 0
        if wait == 0:
            given_out += amount
        assert given_out <= 5.0 + 2.0 * now + 1e-6


def test_the_wait_it_names_is_the_wait_it_takes() -> None:
    bucket = TokenBucket(Quota(rate=2.0, burst=4.0), now=0.0)
    assert bucket.take(4, 0.0) == 0
    wait = bucket.take(2, 0.0)
    assert wait == pytest.approx(1.0)
    assert bucket.take(2, wait * 0.99) > 0
    assert bucket.take(2, wait) == 0


def test_a_request_above_the_burst_passes_when_full_and_leaves_a_debt() -> None:
    bucket = TokenBucket(Quota(rate=1.0, burst=4.0), now=0.0)
    assert bucket.take(10, 0.0) == 0
    assert bucket.take(1, 0.0) == pytest.approx(7.0)


def test_quotas_are_off_until_set_and_are_each_keys_own() -> None:
    quotas = Quotas()
    for _ in range(1000):
        quotas.take("a", 100)
    quotas.set("a", Quota(1.0, 2.0))
    quotas.take("a", 2, now=0.0)
    with pytest.raises(BusyError) as caught:
        quotas.take("a", 1, now=0.0)
    assert caught.value.extra["retry_after"] == pytest.approx(1.0)
    quotas.take("b", 1000)
    quotas.set("a", None)
    quotas.take("a", 1000)
    with pytest.raises(BusyError):
        default = Quotas(Quota(1.0, 1.0))
        default.take("x", 1, now=0.0)
        default.take("x", 1, now=0.0)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def echo() -> Any:
    app = FastAPI()

    @app.post("/{path:path}")
    async def size(path: str, request: Request) -> int:
        return len(await request.body())

    @app.put("/json")
    async def parsed(body: dict[str, Any]) -> int:
        return len(body)

    return BodyLimit(app, 100, larger={"/up/": None, "/mid/": 200})


async def post(path: str, body: bytes | AsyncIterator[bytes], method: str = "POST") -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(echo()), base_url="http://here") as client:
        return await client.request(method, path, content=body)


async def pieces(count: int, taken: list[int]) -> AsyncIterator[bytes]:
    for n in range(count):
        taken.append(n)
        yield b"x" * 50


@pytest.mark.anyio
async def test_bodies_up_to_the_limit_pass() -> None:
    assert (await post("/a", b"x" * 100)).json() == 100
    assert (await post("/mid/a", b"x" * 200)).json() == 200
    assert (await post("/up/a", b"x" * 100_000)).json() == 100_000
    assert (await post("/a", pieces(2, []))).json() == 100


@pytest.mark.anyio
@pytest.mark.parametrize(("path", "size"), [("/a", 101), ("/mid/a", 201)])
async def test_a_declared_length_over_the_limit_is_refused(path: str, size: int) -> None:
    answer = await post(path, b"x" * size)
    assert answer.status_code == 413
    assert answer.json()["error"]["extra"]["limit"] == size - 1
    assert answer.headers["connection"] == "close"


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["POST", "PUT"])
async def test_an_endless_body_is_cut_as_soon_as_it_is_over(method: str) -> None:
    taken: list[int] = []
    answer = await post("/json" if method == "PUT" else "/a", pieces(1000, taken), method)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "too_large"
    assert len(taken) < 10
