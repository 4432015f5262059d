"""One model measured in a process of its own: `python -m llmo.compression.measure ENGINE MODEL WORK CORES`.

Its orders: `answers FILE` runs every text and keeps the logits, `round` times one pass.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmo import plugins
from llmo.compression.orders import Answer, follow, peak_memory, unknown
from llmo.engines.base import Engine, Request
from llmo.types import Device


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 at the end of input, 1 when the model cannot be run."""
    name, model, work_file, cores = argv
    work = json.loads(Path(work_file).read_text(encoding="utf-8"))

    def load() -> Engine:
        engine: Engine = plugins.load("llmo.engines", name)()
        engine.load(Path(model), Device("cpu", "cpu", memory=0, free=0, cores=int(cores)))
        return engine

    return follow(load, lambda engine, words: obey(engine, work, words))


def obey(engine: Engine, work: Mapping[str, Any], words: list[str]) -> Answer:
    """Do one command. `work`: `texts` (token ids), `batches`, `timed` and `singles` (numbers of texts)."""
    match words:
        case ["answers", file]:
            return _answers(engine, work, Path(file))
        case ["round"]:
            return _round(engine, work)
        case _:
            raise unknown(words)


def _answers(engine: Engine, work: Mapping[str, Any], file: Path) -> Answer:
    """Logits of every text, under its number, in a `.npz`; this pass also warms the engine up."""
    logits: dict[str, Any] = {}
    for batch in work["batches"]:
        logits |= {str(chunk.id): chunk.data for chunk in engine.run(_requests(work, batch))}
    np.savez(file, **logits)
    return {"rss_bytes": peak_memory()}


def _round(engine: Engine, work: Mapping[str, Any]) -> Answer:
    """Seconds for the timed batches, and for each of the single texts."""
    batches = [_requests(work, batch) for batch in work["timed"]]
    singles = [_requests(work, [number]) for number in work["singles"]]
    started = time.perf_counter()
    for requests in batches:
        list(engine.run(requests))
    seconds = time.perf_counter() - started
    latencies = []
    for requests in singles:
        started = time.perf_counter()
        list(engine.run(requests))
        latencies.append(time.perf_counter() - started)
    return {"seconds": seconds, "latencies": latencies, "rss_bytes": peak_memory()}


def _requests(work: Mapping[str, Any], numbers: list[int]) -> list[Request]:
    return [Request(number, work["texts"][number]) for number in numbers]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
