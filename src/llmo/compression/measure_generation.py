"""One generating engine measured in a process of its own: `python -m ... ENGINE MODEL WORK CORES PRECISION`.

Its orders: `score FILE` keeps the log-probabilities of every sequence, `round N` times one pass over the prompts, first
one after another, then all at once, and `width STREAMS N` times so many answers at once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from llmo import plugins
from llmo.compression.orders import Answer, follow, peak_memory, unknown
from llmo.engines.generation import GenerationEngine, GenerationOptions, Prompt, Sampling
from llmo.types import Device

CACHE_BYTES = 512 << 20
_ids = count(1)


def main(argv: list[str]) -> int:
    """Returns the exit code: 0 at the end of input, 1 when the model cannot be run."""
    name, model, work_file, cores, precision = argv
    work = json.loads(Path(work_file).read_text(encoding="utf-8"))

    def load() -> GenerationEngine:
        engine: GenerationEngine = plugins.load("llmo.generators", name)()
        options = GenerationOptions(
            streams=work["streams"],
            cache_bytes=CACHE_BYTES,
            context=work["context"],
            precision=precision,
            lookup=False,  # answers are written past their end, where they repeat themselves more than real ones
        )
        engine.load(Path(model), Device("cpu", "cpu", memory=0, free=0, cores=int(cores)), options)
        return engine

    return follow(load, lambda engine, words: obey(engine, work, words))


def obey(engine: GenerationEngine, work: Mapping[str, Any], words: list[str]) -> Answer:
    """Do one order. `work`: `sequences` and `prompts` (token ids), `lengths` (tokens to write a prompt), `alone`
    (numbers of the prompts that are also timed one at a time), `context`, `streams`."""
    match words:
        case ["score", file]:
            found = engine.score(work["sequences"])
            np.savez(file, **{str(i): scores for i, scores in enumerate(found)})  # type: ignore[arg-type]
            return {"rss_bytes": peak_memory()}
        case ["round", number]:
            return _round(engine, work, number)
        case ["width", streams, number]:
            return _width(engine, work, int(streams), number)
        case _:
            raise unknown(words)


def _round(engine: GenerationEngine, work: Mapping[str, Any], number: str) -> Answer:
    """Seconds of both passes, and each lone prompt's time to the first token. A tenant of its own each time, so that
    no prompt is found in the cache of an earlier pass."""
    prompts = list(zip(work["prompts"], work["lengths"], strict=True))
    began = time.perf_counter()
    firsts = [_drain(engine, [prompts[i]], f"{number} one {i}") for i in work["alone"]]
    one = time.perf_counter() - began
    began = time.perf_counter()
    _drain(engine, prompts, f"{number} many")
    return {"one": one, "many": time.perf_counter() - began, "firsts": firsts, "rss_bytes": peak_memory()}


def _width(engine: GenerationEngine, work: Mapping[str, Any], streams: int, number: str) -> Answer:
    """Prompts of all lengths, which stand by length. They come again where there are fewer, and are asked as new ones:
    each for a tenant of its own."""
    prompts = list(zip(work["prompts"], work["lengths"], strict=True))
    apart = max(1, len(prompts) // streams)
    wanted = [prompts[(int(number) + apart // 2 + i * apart) % len(prompts)] for i in range(streams)]
    began = time.perf_counter()
    _drain(engine, wanted, f"{number} wide {streams}", apart=True)
    return {"tokens": sum(length for _, length in wanted), "seconds": time.perf_counter() - began}


def _drain(
    engine: GenerationEngine, prompts: list[tuple[list[int], int]], tenant: str, *, apart: bool = False
) -> float:
    """Write all answers to their full length, greedily; returns the seconds until the first token of any. No prompt
    finds another one's in the cache where they are to be `apart`."""
    began = time.perf_counter()
    for ids, length in prompts:
        sampling = Sampling(max_tokens=length, temperature=0.0, ignore_end=True)
        id = next(_ids)
        engine.add(Prompt(id, ids, sampling, tenant=f"{tenant} {id}" if apart else tenant))
    first, left = 0.0, len(prompts)
    while left:
        deltas = engine.step()
        if not first and any(delta.tokens for delta in deltas):
            first = time.perf_counter() - began
        left -= sum(delta.finish is not None for delta in deltas)
        for _, error in engine.failed():
            raise error
    return first


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
