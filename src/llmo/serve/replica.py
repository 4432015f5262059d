"""The operation `serve`: one model behind one unix socket, tested on its own evidence before it says it is ready."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import stat
import tempfile
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from llmo.context import Context
from llmo.errors import EnvironmentProblem
from llmo.serve import encoder, generator
from llmo.serve.protocol import SCHEME
from llmo.serve.session import Served, Session
from llmo.tasks.card import read_card

TICK = 0.05  # seconds between looks at deadlines and at the request to stop
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
    # Also read when torch loads: oneDNN and torch's bridge to it each keep compiled products of the last 1024 shapes,
    # and every length of a prompt is a shape. At fp32 that grew to 400 MB; the last 64 take 40 and answer as fast.
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    folder = inputs["model"]
    card = read_card(folder)
    cores = min(ctx.device.cores, spec["cores"] or ctx.device.cores)
    device = dataclasses.replace(ctx.device, cores=cores)
    kind: Any = generator if card["task"]["task"] == "generation" else encoder
    if spec.get("slo") is not None:
        spec, device = encoder.settled(folder, card, spec, device, ctx)
    pipeline = kind.make(folder, card, spec, device)
    pipeline.start()
    try:
        ctx.note(kind.check(pipeline, folder, card))
        _run_loop(_serve(pipeline, kind.Session, spec["deadline_seconds"], ctx))
    finally:
        pipeline.close()
    if pipeline.broken is not None:
        raise pipeline.broken
    numbers: dict[str, Any] = pipeline.stats()
    return numbers


async def _serve(pipeline: Served, connected: type[Session], deadline_seconds: float, ctx: Context) -> None:
    loop = asyncio.get_running_loop()
    sessions: set[Session] = set()
    path = new_socket_path()
    server = await loop.create_unix_server(lambda: connected(pipeline, deadline_seconds, sessions), str(path))
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
