"""The operation `serve`: one model behind one unix socket, tested on its own evidence before it says it is ready."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import stat
import tempfile
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmo import plugins
from llmo.context import Context
from llmo.engines.base import Engine
from llmo.errors import EnvironmentProblem, GateRefused, InputError, LLMOError
from llmo.serve.batcher import Batcher
from llmo.serve.pipeline import Call, Pipeline
from llmo.serve.protocol import SCHEME, VERSION, Frames, answers_frame, error_frame, frame
from llmo.tasks.base import Task
from llmo.tasks.card import load_task, load_tokenizer, read_card, read_golden
from llmo.types import Device

TICK = 0.05  # seconds between looks at deadlines and at the request to stop
_LOSSY_AGREEMENT = 0.8  # a model of lower precision may answer a borderline text otherwise; a wrong one is near chance
_LONGEST_PATH = 100  # of a unix socket: the system allows 107 bytes


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """Serve `inputs["model"]` until asked to stop; `spec` is DeploySpec.plain(). Returns the replica's numbers.

    Raises GateRefused when the model does not repeat its golden answers, ModelError or EnvironmentProblem when
    it cannot be loaded, JobFailed when the engine fails on everything.
    """
    # The cores were granted to the engine; the tokeniser's own pool would take them all, and one thread suffices.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Read when torch loads: OpenMP threads that spin while they wait fight the threads beside them for the cores;
    # at 16 clients on two busy cores sleeping ones answered 1.8 times as much.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    folder = inputs["model"]
    card = read_card(folder)
    task = load_task(folder)
    engine: Engine = plugins.load("llmo.engines", card["engine"])()
    cores = min(ctx.device.cores, spec["cores"] or ctx.device.cores)
    device = dataclasses.replace(ctx.device, cores=cores)
    pipeline = Pipeline(
        task,
        load_tokenizer(folder),
        engine,
        lambda: engine.load(folder, device),
        queue=spec["queue"],
        batcher=_batcher(spec["max_batch_tokens"], device),
    )
    pipeline.start()
    try:
        ctx.note(self_test(pipeline, task, read_golden(folder), exact=card["precision"] == "fp32"))
        _run_loop(_serve(pipeline, spec["deadline_seconds"], ctx))
    finally:
        pipeline.close()
    if pipeline.broken is not None:
        raise pipeline.broken
    return pipeline.stats()


def _batcher(max_batch_tokens: int, device: Device) -> Batcher:
    """Measured with MiniLM on one and two CPU cores: a run costs as much as 12 to 17 tokens beyond its own, and
    past 1024 tokens a batch leaves the caches and gets 10 to 15% slower. A GPU has room for thousands."""
    if device.kind == "cpu":
        return Batcher(min(max_batch_tokens, 1024))
    return Batcher(max_batch_tokens, max_items=256, slack_tokens=512)


def self_test(pipeline: Pipeline, task: Task, golden: Sequence[Mapping[str, Any]], *, exact: bool) -> str:
    """Ask for the golden texts as a client would; one line on how it went. Raises GateRefused.

    Token ids must be equal. Answers must agree: all of them for fp32, most of them for a lower precision.
    """
    answers: list[dict[str, Any]] = []
    step = min(16, pipeline.queue)
    for start in range(0, len(golden), step):
        answers += _ask(pipeline, [g["text"] for g in golden[start : start + step]])
    agreed = 0
    for said, expected in zip(answers, golden, strict=True):
        if said["input_ids"] != list(expected["input_ids"]):
            raise GateRefused(
                f"the text {expected['text'][:60]!r} becomes other tokens than in training",
                hint="the tokeniser in the model folder is not the one of training: train the model again",
            )
        agreed += task.agree(
            np.asarray(said["logits"], dtype=np.float32), np.asarray(expected["logits"], dtype=np.float32)
        )
    needed = len(golden) if exact else _LOSSY_AGREEMENT * len(golden)
    if not golden or agreed < needed:
        raise GateRefused(
            f"the model repeats {agreed} of its {len(golden)} golden answers",
            hint="it is not what was trained: run `llmo verify` on it",
        )
    return f"self-test: {agreed} of {len(golden)} golden answers repeated"


def _ask(pipeline: Pipeline, texts: Sequence[str]) -> list[dict[str, Any]]:
    heard = threading.Event()
    outcome: list[bytes | LLMOError] = []

    def done(what: bytes | LLMOError) -> None:
        outcome.append(what)
        heard.set()

    pipeline.submit(Call(texts, float("inf"), done, logits=True))
    heard.wait()
    if isinstance(outcome[0], LLMOError):
        raise outcome[0]
    answers: list[dict[str, Any]] = json.loads(outcome[0])
    return answers


async def _serve(pipeline: Pipeline, deadline_seconds: float, ctx: Context) -> None:
    loop = asyncio.get_running_loop()
    sessions: set[_Session] = set()
    path = new_socket_path()
    server = await loop.create_unix_server(lambda: _Session(pipeline, deadline_seconds, sessions), str(path))
    try:
        ctx.ready(SCHEME + str(path))
        while not ctx.should_stop() and pipeline.broken is None:
            await asyncio.sleep(TICK)
            pipeline.expire(time.time())
        server.close()
        path.unlink(missing_ok=True)
        leaving = asyncio.create_task(asyncio.to_thread(pipeline.drain, deadline_seconds))
        while not leaving.done():
            await asyncio.wait([leaving], timeout=TICK)
            pipeline.expire(time.time())
        await asyncio.sleep(0)  # what the last answers put on the loop is written before the connections close
    finally:
        path.unlink(missing_ok=True)
        for session in list(sessions):
            session.transport.close()
        await asyncio.sleep(0)


class _Session(Frames):
    """The replica's end of one connection. A gateway that goes takes its calls with it."""

    def __init__(self, pipeline: Pipeline, deadline_seconds: float, sessions: set[_Session]) -> None:
        super().__init__()
        self._pipeline = pipeline
        self._deadline_seconds = deadline_seconds
        self._sessions = sessions
        self._calls: dict[int, Call] = {}
        self._loop = asyncio.get_running_loop()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._sessions.add(self)
        self.transport.write(frame({"hello": VERSION, "deadline_seconds": self._deadline_seconds}))

    def connection_lost(self, exc: Exception | None) -> None:
        self._sessions.discard(self)
        for call in self._calls.values():
            self._pipeline.cancel(call)
        self._calls.clear()

    def received(self, data: bytes) -> None:
        body = json.loads(data)
        number = body["id"]
        match body["op"]:
            case "predict":
                self._predict(number, body)
            case "cancel":
                call = self._calls.pop(number, None)
                if call is not None:
                    self._pipeline.cancel(call)
            case "stats":
                self.transport.write(frame({"id": number, "stats": self._pipeline.stats()}))
            case other:
                self.transport.write(error_frame(number, InputError(f"a replica does not know '{other}'")))

    def _predict(self, number: int, body: Mapping[str, Any]) -> None:
        def done(outcome: bytes | LLMOError) -> None:
            self._loop.call_soon_threadsafe(self._answer, number, outcome)

        now = time.time()
        deadline = body.get("deadline") or now + self._deadline_seconds
        call = Call(body["texts"], deadline, done, logits=body.get("logits", False))
        self._calls[number] = call
        try:
            self._pipeline.submit(call)
        except LLMOError as error:
            self._answer(number, error)

    def _answer(self, number: int, outcome: bytes | LLMOError) -> None:
        if self._calls.pop(number, None) is None or self.transport.is_closing():
            return
        try:
            data = error_frame(number, outcome) if isinstance(outcome, LLMOError) else answers_frame(number, outcome)
        except LLMOError as error:
            data = error_frame(number, error)
        self.transport.write(data)


def new_socket_path() -> Path:
    """A fresh path in a folder that only this user can enter; sockets of dead replicas there are removed.

    Raises EnvironmentProblem when the folder belongs to someone else.
    """
    base = Path(tempfile.gettempdir())
    folder = (base if len(str(base)) < _LONGEST_PATH - 40 else Path("/tmp")) / f"llmo-{os.getuid()}"  # noqa: S108
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise EnvironmentProblem(
            f"{folder} is not a private folder of this user, so replicas cannot listen there",
            hint="remove it, or set TMPDIR to a folder of your own",
        )
    for old in folder.glob("*.sock"):
        if not Path(f"/proc/{old.name.partition('-')[0]}").exists():
            old.unlink(missing_ok=True)
    return folder / f"{os.getpid()}-{os.urandom(4).hex()}.sock"


def _run_loop(main: Coroutine[Any, Any, None]) -> None:
    try:
        import uvloop  # optional: halves the cost of the hop where it is installed
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)
