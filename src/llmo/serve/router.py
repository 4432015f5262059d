"""Which replica answers an endpoint: a table in memory, kept fresh beside the requests, and one retry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from llmo import naming
from llmo.errors import BusyError, NotFoundError, UnreachableError, nearest
from llmo.kernel.paging import Use
from llmo.serve.adapters import Ready, missing
from llmo.serve.ask import Ask
from llmo.serve.connection import Replica, stats_of
from llmo.serve.protocol import ReplicaGone, frame, last_used
from llmo.serve.stream import Stream
from llmo.serve.waking import Waking, patience
from llmo.types import Adapter, Asked, Endpoint

T = TypeVar("T")

_TRIES = 3  # replicas asked for one request before it fails
_log = logging.getLogger("llmo.serve")


@dataclass(frozen=True, slots=True)
class Reply:
    """`answers` is the JSON list as the replica wrote it; `model` the version that answered, `name@version`."""

    model: str
    answers: bytes


@dataclass(frozen=True, slots=True)
class Generating:
    """An answer that has begun: its frames come through `stream`, which whoever has it must close."""

    model: str
    stream: Stream


Call = Callable[[Replica, Mapping[str, Any]], Awaitable[T]]


@dataclass(frozen=True, slots=True)
class Target:
    """One endpoint as the table has it."""

    endpoint: Endpoint
    replicas: tuple[Replica, ...]
    adapters: Mapping[str, Ready]

    @property
    def model(self) -> str:
        return self.endpoint.model_ref or self.endpoint.model


@dataclass(slots=True)
class _Asked:
    """How many calls ask an endpoint or wait for it, and when the last one came or went (monotonic clock)."""

    now: int = 0
    at: float = 0.0


class Router:
    """Sends a call to the replica of an endpoint that has the fewest outstanding.

    `load` reads the endpoints (`store.endpoints.list`), and `adapters` what else they answer with
    (`AdapterTable.load`), in a thread, every `refresh_seconds` and when a replica has gone. An endpoint's `address`
    may hold several, separated by commas. A replica that left the table is closed once its last call is answered, so
    a swap fails nobody. Calls to an endpoint that is asleep wait for it; `want` says in that thread that it is to
    wake, and `woken` is told when it did, after how many seconds.
    """

    def __init__(
        self,
        load: Callable[[], Sequence[Endpoint]],
        adapters: Callable[[Sequence[Endpoint]], Mapping[str, Mapping[str, Ready]]] = lambda _: {},
        *,
        refresh_seconds: float = 0.2,
        want: Callable[[str], None] = lambda name: None,
        woken: Callable[[str, float], None] = lambda name, seconds: None,
    ) -> None:
        self._load = load
        self._load_adapters = adapters
        self._want = want
        self._waking = Waking(want, woken)
        self._asked: dict[str, _Asked] = {}
        self._refresh_seconds = refresh_seconds
        self._table: dict[str, Target] = {}
        self._names: dict[str, naming.Meaning] = {}
        self._replicas: dict[str, Replica] = {}
        self._refreshing = asyncio.Lock()
        self._began = 0.0  # when the load that made the table began
        self.ready = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Router]:
        """Keeps the table fresh while entered; closes the connections at the end."""
        await self._refresh_quietly()
        task = asyncio.create_task(self._keep_fresh())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            for replica in self._replicas.values():
                replica.close()
            await asyncio.sleep(0)

    async def refresh(self) -> None:
        """Read the endpoints again; shared with whoever asks meanwhile, but never older than this call."""
        asked = time.monotonic()
        async with self._refreshing:
            if self._began > asked:
                return
            began = time.monotonic()
            self._apply(*await asyncio.to_thread(self._read))
            self._began = began
            self.ready = True

    def use(self, name: str, address: str) -> Use:
        """How the replica of an endpoint is used, for whoever decides which one gives way; any thread may ask. `at`
        counts those too who ask it without this router."""
        target, replica = self._table.get(name), self._replicas.get(address)
        asked = self._asked.get(name, _Asked())
        if replica is None:
            return Use(asked=asked.now, at=asked.at)
        at = max(asked.at, last_used(address))
        return Use(target is not None and replica in target.replicas, asked.now, replica.outstanding, at)

    def endpoints(self) -> list[Endpoint]:
        """What the table holds, by name."""
        return [self._table[name].endpoint for name in sorted(self._table)]

    def adapters(self, name: str) -> list[Adapter]:
        """What an endpoint also answers with, by name; nothing for one that is not in the table."""
        target = self._table.get(name)
        return [] if target is None else [ready.adapter for _, ready in sorted(target.adapters.items())]

    async def find(self, model: str) -> tuple[str, str | None]:
        """The endpoint, and its adapter if it is one, that `model` names: ENDPOINT, ENDPOINT:ADAPTER, or the version
        NAME@VERSION of either. Raises NotFoundError."""
        if model not in self._names:
            await self._refresh_quietly()
        found = self._names.get(model)
        if found is not None:
            return found
        name, adapter = naming.split(model)
        target = await self._find(name)
        if adapter is None or adapter in target.adapters:
            return name, adapter  # it came while it was looked for
        raise missing(name, adapter, target.adapters)

    def endpoint_of(self, model: str) -> str | None:
        """The endpoint that is asked by this name, with such an adapter or without; None for none in the table."""
        name, _ = self._names.get(model) or naming.split(model)
        return name if name in self._table else None

    async def endpoint(self, name: str) -> Endpoint:
        """Raises NotFoundError."""
        return (await self._find(name)).endpoint

    async def predict(
        self,
        name: str,
        texts: Sequence[Asked],
        *,
        adapter: str | None = None,
        deadline: float | None = None,
        logits: bool = False,
        tenant: str = "",
    ) -> Reply:
        """Answers of the endpoint's model, or of one of its adapters; `deadline` in unix seconds, None for the
        endpoint's own.

        Raises NotFoundError, UnreachableError, and what the replica raises (BusyError, DeadlineError, InputError).
        A call whose replica goes before it answers is sent once more to another one: predicting twice is harmless.
        """
        body = {"op": "predict", "texts": texts, "deadline": deadline, "logits": logits, "tenant": tenant}
        return Reply(*await self._send(name, adapter, body, Replica.call, len(texts), deadline))

    async def embed(
        self, name: str, inputs: Sequence[str | Sequence[int]], *, adapter: str | None = None, tenant: str = ""
    ) -> Reply:
        """Embeddings of texts or token ids, each `{"embedding": base64 of float32, "tokens"}`. Raises as `predict`."""
        body = {"op": "embed", "texts": inputs, "deadline": None, "tenant": tenant}
        return Reply(*await self._send(name, adapter, body, Replica.call, len(inputs)))

    async def generate(
        self, name: str, ask: Ask, *, adapter: str | None = None, tenant: str = "", deadline: float | None = None
    ) -> Generating:
        """The beginning of an answer of the endpoint's model, or of one of its adapters. Raises as `predict`; once it
        has begun, a replica that goes ends the stream with ReplicaGone, for nobody else can go on with it."""
        body = {"op": "generate", "ask": ask.to_json(), "deadline": deadline, "tenant": tenant}
        return Generating(*await self._send(name, adapter, body, Replica.open, ask.choices, deadline))

    async def _send(
        self,
        name: str,
        adapter: str | None,
        body: Mapping[str, Any],
        send: Call[T],
        size: int,
        deadline: float | None = None,
    ) -> tuple[str, T]:
        """The version that answers, the endpoint's model or an adapter's, and what it says."""
        if adapter is None:
            return await self._ask(name, body, send, size, deadline)
        answering: list[Ready] = []

        async def sent(replica: Replica, body: Mapping[str, Any]) -> T:
            ready = self._table[name].adapters.get(adapter)  # of the very table that named the replica
            if ready is None:
                raise NotFoundError(f"the endpoint '{name}' has no adapter '{adapter}' any more")
            answering[:] = [ready]
            return await send(replica, {**body, "adapter": ready.folder})

        _, said = await self._ask(name, body, sent, size, deadline)
        return answering[0].adapter.model_ref, said

    async def _ask(
        self, name: str, body: Mapping[str, Any], ask: Call[T], size: int, deadline: float | None
    ) -> tuple[str, T]:
        """As `_answer`, while the endpoint is known to be asked; `size` is what it counts while it waits for one."""
        if name not in self._table:
            await self._find(name)
        asked = self._asked.setdefault(name, _Asked())
        asked.now += 1
        try:
            return await self._answer(name, body, ask, size, deadline)
        finally:
            asked.now -= 1
            asked.at = time.monotonic()

    async def _answer(
        self, name: str, body: Mapping[str, Any], ask: Call[T], size: int, deadline: float | None
    ) -> tuple[str, T]:
        """What the least busy replica says to `ask`, or another one when it is gone or full; and its model."""
        tried: list[Replica] = []
        looked_again = False
        failure: Exception = ReplicaGone("it has no replica")
        while len(tried) < _TRIES:
            target = self._table.get(name) or await self._find(name)
            replica = min((r for r in target.replicas if r not in tried), key=lambda r: r.outstanding, default=None)
            if replica is None and target.endpoint.rests:
                deadline = deadline or time.time() + patience(target.endpoint)
                await self._waking.wait(target.endpoint, size, len(frame(body)), deadline)
                tried.clear()
                continue
            if replica is None and not tried and not looked_again:
                # Whoever was told a moment ago that it is up must not hear from an older table that it is not.
                looked_again = True
                await self._refresh_quietly()
                continue
            if replica is None:
                break
            try:
                return target.model, await ask(replica, body)
            except ReplicaGone as gone:
                failure = gone
                tried.append(replica)
                await self._refresh_quietly()
            except BusyError as busy:
                failure = busy
                tried.append(replica)
        if isinstance(failure, BusyError):
            raise failure
        raise _unreachable((await self._find(name)).endpoint, failure)

    async def stats(self) -> dict[str, list[dict[str, Any]]]:
        """Each endpoint's replicas' numbers; a replica that does not answer in a second is left out."""
        asked = [(name, replica) for name, target in self._table.items() for replica in target.replicas]
        found = await asyncio.gather(*(stats_of(replica) for _, replica in asked))
        by_name: dict[str, list[dict[str, Any]]] = {name: [] for name in self._table}
        for (name, _), numbers in zip(asked, found, strict=True):
            if numbers is not None:
                by_name[name].append(numbers)
        return by_name

    async def _find(self, name: str) -> Target:
        if name not in self._table:
            await self._refresh_quietly()
        target = self._table.get(name)
        if target is None:
            known = sorted(self._table)
            raise NotFoundError(
                f"no endpoint '{name}'{nearest(name, known)}",
                hint="see `llmo endpoints`" if known else "deploy a model first: `llmo deploy MODEL`",
            )
        return target

    def _apply(self, endpoints: Sequence[Endpoint], adapters: Mapping[str, Mapping[str, Ready]]) -> None:
        table: dict[str, Target] = {}
        for endpoint in endpoints:
            addresses = (endpoint.address or "").split(",") if endpoint.state != "down" else []
            replicas = tuple(self._replicas.setdefault(a, Replica(a)) for a in addresses if a)
            table[endpoint.name] = Target(endpoint, replicas, adapters.get(endpoint.name, {}))
        self._table = table
        of_all = (ready.adapter for found in adapters.values() for ready in found.values())
        self._names = naming.meanings(endpoints, of_all)
        self._waking.heard({name: target.endpoint for name, target in table.items()})
        used = {r.address for target in table.values() for r in target.replicas}
        for address in [a for a, r in self._replicas.items() if a not in used and r.outstanding == 0]:
            self._replicas.pop(address).close()

    def _read(self) -> tuple[Sequence[Endpoint], Mapping[str, Mapping[str, Ready]]]:
        """The endpoints with their adapters; one that fell asleep again before those who wait for it were answered is
        asked for again."""
        found = self._load()
        for endpoint in found:
            if endpoint.state == "asleep" and endpoint.name in self._waking:
                self._want(endpoint.name)
        return found, self._load_adapters(found)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_seconds)
            await self._refresh_quietly()

    async def _refresh_quietly(self) -> None:
        try:
            await self.refresh()
        except Exception as error:  # whatever the store's trouble is, requests go on with the table there is
            self.ready = False
            _log.warning("the endpoints cannot be read: %s", error)


def _unreachable(endpoint: Endpoint, failure: Exception) -> UnreachableError:
    if endpoint.state == "starting":
        return UnreachableError(
            f"the endpoint '{endpoint.name}' is starting", hint="ask again in a few seconds; see `llmo endpoints`"
        )
    return UnreachableError(
        f"no replica of '{endpoint.name}' answers: {failure}",
        hint=f"it is started again by itself when it can be; see `llmo logs {endpoint.job or ''}`".rstrip(),
    )
