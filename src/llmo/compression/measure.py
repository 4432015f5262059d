"""One model measured in a process of its own: `python -m llmo.compression.measure ENGINE MODEL WORK CORES`.

Its orders: `answers FILE` runs every text and keeps the logits, `load CLIENTS COUNT` times that many texts of clients
who each wait for their answer before they send the next text.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llmo import plugins
from llmo.compression.orders import Answer, follow, peak_memory, unknown
from llmo.engines.base import Engine, Request
from llmo.engines.batcher import Item, batcher_for
from llmo.types import MAX_BATCH_TOKENS, Device


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 at the end of input, 1 when the model cannot be run."""
    name, model, work_file, cores = argv
    work = json.loads(Path(work_file).read_text(encoding="utf-8"))
    device = Device("cpu", "cpu", memory=0, free=0, cores=int(cores))

    def load() -> Engine:
        engine: Engine = plugins.load("llmo.engines", name)()
        engine.load(Path(model), device)
        list(engine.run([Request(0, work["texts"][0])]))  # it is ready once it has answered
        return engine

    return follow(load, lambda engine, words: obey(engine, device, work, words))


def obey(engine: Engine, device: Device, work: Mapping[str, Any], words: list[str]) -> Answer:
    """Do one command. `work`: `texts` (token ids), `batches` and `timed` (numbers of texts)."""
    match words:
        case ["answers", file]:
            return _answers(engine, work, Path(file))
        case ["load", clients, count]:
            return _load(engine, device, work, int(clients), int(count))
        case _:
            raise unknown(words)


def _answers(engine: Engine, work: Mapping[str, Any], file: Path) -> Answer:
    """Logits of every text, under its number, in a `.npz`; this pass also warms the engine up."""
    logits: dict[str, Any] = {}
    started = time.perf_counter()
    for batch in work["batches"]:
        requests = [Request(number, work["texts"][number]) for number in batch]
        logits |= {str(chunk.id): chunk.data for chunk in engine.run(requests)}
    seconds = time.perf_counter() - started
    np.savez(file, **logits)
    return {"seconds": seconds, "rss_bytes": peak_memory()}


def _load(engine: Engine, device: Device, work: Mapping[str, Any], clients: int, count: int) -> Answer:
    """Seconds for all of the texts, and from sending to answer for each; batches are those that a replica cuts."""
    batcher = batcher_for(engine, device, MAX_BATCH_TOKENS)
    texts, sent = work["texts"], dict[int, float]()
    waiting = iter(work["timed"][:count])
    latencies: list[float] = []

    def send(some: int) -> None:
        now = time.perf_counter()
        for number in islice(waiting, some):
            sent[number] = now
            batcher.add(Item(len(texts[number]), payload=number))

    started = time.perf_counter()
    send(clients)
    while len(batcher):
        batch, _ = batcher.take(0.0)
        for _ in engine.run([Request(item.payload, texts[item.payload]) for item in batch]):
            pass
        now = time.perf_counter()
        latencies += [now - sent[item.payload] for item in batch]
        send(len(batch))
    return {"seconds": time.perf_counter() - started, "latencies": latencies, "rss_bytes": peak_memory()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
