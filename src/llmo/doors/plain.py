"""The usual way to serve an encoder, to compare with: FastAPI and a transformers pipeline, as their tutorials have it.

`python -m llmo.doors.plain TASK FOLDER MAX_LENGTH` prints its address once it listens, and ends with whoever started
it.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import httpx

from llmo.errors import EnvironmentProblem

# The pipelines of transformers that answer what these tasks ask of one text.
PIPELINES = {
    "text-classification": "text-classification",
    "regression": "text-classification",
    "token-classification": "token-classification",
}
START_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Plain:
    """Where it answers `{"text": ...}`, its process, and the seconds from its start to its first answer."""

    url: str
    pid: int
    cold_seconds: float


@contextmanager
def plain(
    task: str, folder: Path, max_length: int, cores: int, tick: Callable[[], None] = lambda: None
) -> Iterator[Plain]:
    """A server of the model in `folder` for as long as the block lasts, on `cores`; `tick` is called while it loads.

    Raises EnvironmentProblem when it does not come up.
    """
    began = time.perf_counter()
    with TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__, task, str(folder), str(max_length)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # a Ctrl-C is for whoever asked
            env={**os.environ, "OMP_NUM_THREADS": str(cores), "TRANSFORMERS_VERBOSITY": "error"},
        )
        try:
            url = _address(process, began + START_SECONDS, tick)
            if url is None:
                log.seek(0)
                raise _failed(log.read().decode("utf-8", "replace").strip().splitlines())
            httpx.post(url, json={"text": "Ready?"}, timeout=START_SECONDS, trust_env=False).raise_for_status()
            yield Plain(url, process.pid, time.perf_counter() - began)
        finally:
            process.kill()
            process.communicate()


def _address(process: subprocess.Popen[bytes], until: float, tick: Callable[[], None]) -> str | None:
    """None when it ended, or took too long."""
    if process.stdout is None:
        return None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not selector.select(0.2):
            tick()
            if time.perf_counter() > until:
                return None
    line = process.stdout.readline()
    return str(json.loads(line)["url"]) if line else None


def _failed(said: list[str]) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the plain pipeline does not start{': ' + said[-1][:200] if said else ''}",
        hint="measure the endpoint alone: --no-pipeline",
    )


def serve(task: str, folder: str, max_length: int) -> None:
    """What its tutorials write, but for the last three lines."""
    import uvicorn
    from fastapi import FastAPI
    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=max_length)  # what tagging cuts texts at
    answer: Any = pipeline(PIPELINES[task], model=folder, tokenizer=tokenizer)  # type: ignore[call-overload]
    options = {"truncation": True, "max_length": max_length} if PIPELINES[task] == "text-classification" else {}
    app = FastAPI()

    @app.post("/predict")
    def predict(body: dict[str, str]) -> Any:
        return [{**found, "score": float(found["score"])} for found in answer(body["text"], **options)]

    listening = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write(json.dumps({"url": f"http://127.0.0.1:{listening.getsockname()[1]}/predict"}) + "\n")
    sys.stdout.flush()
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
