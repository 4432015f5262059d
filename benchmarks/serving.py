"""Requests per second at 1, 16 and 64 clients: an LLMO endpoint against FastAPI with a transformers pipeline.

Both serve the demo's model, on the same machine, one text a request, texts of mixed length cut from held-out articles.
The two are loaded alternately; the accuracy of both over HTTP on the whole test split stands beside.
Run `make demo` first, then: python benchmarks/serving.py [--rounds 5] [--seconds 6]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from load import measure

ENDPOINT = "newsdesk"  # the demo's own, which is given all cores for this
LEVELS = (1, 16, 64)


def serve_pipeline(folder: str, port: int) -> None:
    """The usual choice, as its own tutorials write it."""
    import uvicorn
    from fastapi import FastAPI
    from transformers import pipeline

    app = FastAPI()
    classify = pipeline("text-classification", model=folder, tokenizer=folder)

    @app.post("/predict")
    def predict(body: dict[str, str]) -> Any:
        return classify(body["text"], truncation=True, max_length=128)

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


@contextmanager
def usual(folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, "--pipeline", str(folder), "--port", str(port)])
    url = f"http://127.0.0.1:{port}/predict"
    try:
        for _ in range(600):
            try:
                if httpx.post(url, json={"text": "ready?"}).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


def llmo(*arguments: str) -> Any:
    command = [sys.executable, "-m", "llmo.doors.cli", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


@contextmanager
def ours(model: str, cores: int) -> Iterator[tuple[str, str]]:
    server = llmo("up", "--detach", "--port", "0")
    try:
        key = server["key"] or llmo("key", "make", "benchmark", "--role", "admin")["key"]
        llmo("deploy", model, "--endpoint", ENDPOINT, "--set", f"cores={cores}")
        yield f"{server['url']}/v1/endpoints/{ENDPOINT}/predict", key
    finally:
        llmo("down")


def mixed(rows: Sequence[dict[str, Any]], count: int = 400, seed: int = 7) -> list[str]:
    """Beginnings of held-out articles: log-normal lengths, median 25 words, 5 to 250."""
    rng = random.Random(seed)
    lengths = [min(250, max(5, int(rng.lognormvariate(3.2, 0.9)))) for _ in range(count)]
    return [" ".join(rng.choice(rows)["text"].split()[:length]) for length in lengths]


def accuracy(url: str, key: str, rows: Sequence[dict[str, Any]]) -> float:
    right = 0
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(headers=headers, timeout=60) as client:
        for row in rows:
            found = client.post(url, json={"text": row["text"]}).json()
            answer = found["answers"][0] if isinstance(found, dict) else found[0]
            right += answer["label"] == row["label"]
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="newsdesk-compressed")
    parser.add_argument("--reference", default="model:newsdesk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--accuracy-texts", type=int, default=10_000, help="held-out texts the accuracy is taken on")
    parser.add_argument("--pipeline")
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    if given.pipeline:
        serve_pipeline(given.pipeline, given.port)
        return
    from llmo.errors import NotFoundError
    from llmo.system import System

    with System() as system:
        try:
            folder = system.path(given.reference)
        except NotFoundError as error:
            parser.error(f"{error}; run `make demo` first")
        rows = system.rows(system.artifact(given.reference).inputs["data"], "test", limit=10_000)
    measured = rows[:: max(1, len(rows) // given.accuracy_texts)]
    texts = mixed(rows)
    with usual(folder) as theirs, ours(given.model, len(os.sched_getaffinity(0))) as (url, key):
        sides = {"llmo": (url, key), "pipeline": (theirs, "")}
        for name, (address, secret) in sides.items():
            found = accuracy(address, secret, measured)
            print(f"{name}: accuracy on {len(measured)} held-out texts {found:.4f}", flush=True)
        for clients in LEVELS:
            rates: dict[str, list[float]] = {name: [] for name in sides}
            latency: dict[str, list[float]] = {name: [] for name in sides}
            for number in range(given.rounds):
                for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
                    found = asyncio.run(measure(*sides[name], clients, given.seconds, texts)).summary()
                    assert not found["failed"], found
                    rates[name].append(found["requests_per_second"])
                    latency[name].append(found["median_ms"])
            ratios = [a / b for a, b in zip(rates["llmo"], rates["pipeline"], strict=True)]
            shown = {n: f"{statistics.median(rates[n]):.0f}/s, {statistics.median(latency[n]):.1f} ms" for n in sides}
            print(
                f"{clients} clients: llmo {shown['llmo']}; pipeline {shown['pipeline']}; "
                f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
