"""One model measured in a process of its own: `python -m llmo.compression.measure ENGINE MODEL WORK CORES`.

It loads, says so, and then does what it is told on standard input, one word a line, answering each with one line
of JSON: `answers FILE` runs every text and keeps the logits, `round` times one pass. It ends when standard input
does, so it never outlives the process that asked.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import psutil

from llmo import plugins
from llmo.engines.base import Engine, Request
from llmo.errors import LLMOError
from llmo.types import Device

Answer = dict[str, Any]


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 at the end of input, 1 when the model cannot be run."""
    started = time.perf_counter()
    replies = _own_stdout()
    name, model, work_file, cores = argv
    work = json.loads(Path(work_file).read_text(encoding="utf-8"))
    try:
        engine: Engine = plugins.load("llmo.engines", name)()
        engine.load(Path(model), Device("cpu", "cpu", memory=0, free=0, cores=int(cores)))
        _say(replies, {"load_seconds": time.perf_counter() - started})
        for line in sys.stdin:
            _say(replies, obey(engine, work, line.split()))
    except LLMOError as error:
        _say(replies, {"error": error.to_json()})
        return 1
    return 0


def obey(engine: Engine, work: Mapping[str, Any], words: list[str]) -> Answer:
    """Do one command. `work`: `texts` (token ids), `batches`, `timed` and `singles` (numbers of texts)."""
    match words:
        case ["answers", file]:
            return _answers(engine, work, Path(file))
        case ["round"]:
            return _round(engine, work)
        case _:
            raise LLMOError(f"measure was told '{' '.join(words)}', which is no command")


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


def peak_memory() -> int:
    """Bytes this process has held at most. Not `ru_maxrss`: that one starts at what the parent held."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)


def _own_stdout() -> TextIO:
    """The real standard output for replies alone; whatever libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _say(replies: TextIO, answer: Answer) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
