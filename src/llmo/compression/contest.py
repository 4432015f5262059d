"""Variants of a model measured against each other: processes of their own that take turns, so that noise cancels."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from llmo.compression.probe import Candidate, Probe
from llmo.context import Context
from llmo.tasks.base import Logits

BATCH = 16
TIMED_TEXTS = 96
SINGLES = 16
ROUNDS = 3
MEASURE = "llmo.compression.measure"


@dataclass(slots=True)
class Measured:
    """What one candidate showed. `logits` are in the order of the texts; the first candidate's `speedup` is 1."""

    load_seconds: float
    rss_bytes: int = 0
    logits: list[Logits] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)  # seconds of each pass over the timed texts
    latencies: list[float] = field(default_factory=list)
    texts_per_second: float = 0.0
    speedup: float = 1.0

    @property
    def latency_ms(self) -> float:
        return 1e3 * median(self.latencies)

    @property
    def p95_ms(self) -> float:
        return 1e3 * float(np.percentile(self.latencies, 95))


def contest(candidates: Sequence[Candidate], texts: Sequence[list[int]], folder: Path, ctx: Context) -> list[Measured]:
    """Measure every candidate on the same texts (token ids); the first is the reference that speedups are relative to.

    Each runs in a fresh process with the device's cores. Logits are taken of all texts; speed in `ROUNDS`
    rounds in which the candidates take turns, forwards and backwards. `folder` is for scratch files.
    Raises the candidate's own error, JobFailed when its process dies, and Stopped.
    """
    work = folder / "work.json"
    schedule = plan(texts)
    work.write_text(json.dumps(schedule), encoding="utf-8")
    timed = sum(len(batch) for batch in schedule["timed"])
    with ExitStack() as stack:
        probes, results = [], []
        for candidate in candidates:
            probe = stack.enter_context(Probe(MEASURE, candidate, work, folder, ctx))
            measured = Measured(load_seconds=probe.read()["load_seconds"])
            measured.logits = _answers(probe, folder / f"{candidate.name}.npz", len(texts))
            probes.append(probe)
            results.append(measured)
            ctx.report(len(results), len(candidates) + ROUNDS, stage=f"answers of {candidate.name}")
        turns = list(zip(probes, results, strict=True))
        for number in range(ROUNDS):
            for probe, measured in turns if number % 2 == 0 else reversed(turns):
                answer = probe.ask("round")
                measured.rounds.append(answer["seconds"])
                measured.latencies += answer["latencies"]
                measured.rss_bytes = answer["rss_bytes"]
            ctx.report(len(results) + number + 1, len(candidates) + ROUNDS, stage="speed")
    for measured in results:
        measured.texts_per_second = timed / median(measured.rounds)
        pairs = zip(results[0].rounds, measured.rounds, strict=True)
        measured.speedup = median(reference / own for reference, own in pairs)
    return results


def plan(texts: Sequence[list[int]]) -> dict[str, Any]:
    """What a measuring process is given: batches of like length, and evenly spread ones among them to time."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    return {
        "texts": list(texts),
        "batches": batches,
        "timed": _spread(batches, TIMED_TEXTS // BATCH),
        "singles": _spread(order, SINGLES),
    }


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` items at even distances, the last one included."""
    if len(items) <= count:
        return items
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def _answers(probe: Probe, file: Path, count: int) -> list[Logits]:
    probe.ask(f"answers {file}")
    with np.load(file, allow_pickle=False) as kept:
        logits = [kept[str(number)] for number in range(count)]
    file.unlink()
    return logits
