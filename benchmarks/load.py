"""Closed-loop load on a predict endpoint: N clients, each with one request in flight; requests a second and latency.

    python benchmarks/load.py http://127.0.0.1:8000/v1/endpoints/NAME/predict --key KEY --clients 1 16 64

Clients are bare asyncio protocols, because an HTTP library costs more than the server it measures. Texts come from
a file with one text a line, else from a seeded mix of lengths (5 to 250 words, most of them short).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

WORDS = (  # noqa: SIM905
    "market shares profit bank trade price company growth match goal team coach league player win cup software phone "
    "chip network game computer internet data the a of in on and to was said year new good people time today"
).split()


@dataclass
class Outcome:
    """What one level of load gave; latencies in seconds, of requests answered 200."""

    clients: int
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    failed: dict[int, int] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.latencies)
        return {
            "clients": self.clients,
            "requests_per_second": round(len(ordered) / self.seconds, 1),
            "median_ms": round(statistics.median(ordered) * 1e3, 2) if ordered else None,
            "p99_ms": round(ordered[int(len(ordered) * 0.99)] * 1e3, 2) if ordered else None,
            "failed": self.failed,
        }


def mixed_texts(count: int = 400, seed: int = 7) -> list[str]:
    """Texts of mixed length: log-normal, median 25 words, cut to 5..250."""
    rng = random.Random(seed)
    lengths = [min(250, max(5, int(rng.lognormvariate(3.2, 0.9)))) for _ in range(count)]
    return [" ".join(rng.choices(WORDS, k=n)) for n in lengths]


class Client(asyncio.Protocol):
    """One connection that sends the next request when the last is answered."""

    def __init__(self, requests: Sequence[bytes], start: int, outcome: Outcome) -> None:
        self._requests = requests
        self._at = start
        self._outcome = outcome
        self._buffer = b""
        self._sent = 0.0
        self.running = True
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport
        self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._requests[self._at % len(self._requests)])
        self._at += 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end].lower()
        size = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        if len(self._buffer) < end + 4 + size:
            return
        status = int(head[9:12])
        if status == 200:
            self._outcome.latencies.append(time.perf_counter() - self._sent)
        else:
            self._outcome.failed[status] = self._outcome.failed.get(status, 0) + 1
        self._buffer = b""
        if self.running:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def measure(url: str, key: str, clients: int, seconds: float, texts: Sequence[str], warm: float = 1.0) -> Outcome:
    """Load `url` with `clients` for `seconds`, after `warm` seconds that are not counted."""
    place = urlsplit(url)
    requests = [_request(place.path, place.netloc, key, text) for text in texts]
    outcome = Outcome(clients)
    loop = asyncio.get_running_loop()
    protocols = []
    for number in range(clients):
        start = number * len(requests) // clients
        _, protocol = await loop.create_connection(
            lambda start=start: Client(requests, start, outcome), place.hostname, place.port
        )
        protocols.append(protocol)
    await asyncio.sleep(warm)
    outcome.latencies.clear()
    outcome.failed.clear()
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    outcome.seconds = time.perf_counter() - began
    counted = Outcome(clients, outcome.seconds, list(outcome.latencies), dict(outcome.failed))
    for protocol in protocols:
        protocol.running = False
    await asyncio.wait([protocol.done for protocol in protocols], timeout=60)
    return counted


def _request(path: str, host: str, key: str, text: str) -> bytes:
    body = json.dumps({"text": text}).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--key", default="")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--texts", type=Path)
    arguments = parser.parse_args()
    texts = arguments.texts.read_text(encoding="utf-8").splitlines() if arguments.texts else mixed_texts()
    for clients in arguments.clients:
        outcome = asyncio.run(measure(arguments.url, arguments.key, clients, arguments.seconds, texts))
        print(json.dumps(outcome.summary()), flush=True)


if __name__ == "__main__":
    main()
