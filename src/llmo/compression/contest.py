"""Variants of a model measured against each other: processes of their own that take turns, so that noise cancels."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from llmo.compression.probe import Candidate, Probe
from llmo.context import Context
from llmo.errors import LLMOError
from llmo.tasks.base import Logits

BATCH = 16
CLIENTS = (1, 16, 64)
MOST_TIMED = {1: 16, 16: 96, 64: 192}  # texts of one round, where the first candidate is quick enough
LEAST_TIMED = 8
ROUND_SECONDS = 4.0  # of the first candidate, about
ROUNDS = 3
SEED = 5
MEASURE = "llmo.compression.measure"


@dataclass(slots=True)
class Level:
    """What one candidate showed under a number of clients: of each round its seconds, and of each text its latency."""

    seconds: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    texts_per_second: float = 0.0

    @property
    def median_ms(self) -> float:
        return 1e3 * median(self.latencies)

    @property
    def p99_ms(self) -> float:
        return 1e3 * float(np.percentile(self.latencies, 99))


@dataclass(slots=True)
class Measured:
    """What one candidate showed. `logits` are in the order of the texts; `ready_seconds` from the start of its process
    to its first answer."""

    ready_seconds: float = 0.0
    rss_bytes: int = 0
    logits: list[Logits] = field(default_factory=list)
    levels: dict[int, Level] = field(default_factory=dict)


def contest(
    candidates: Sequence[Candidate],
    texts: Sequence[list[int]],
    folder: Path,
    ctx: Context,
    *,
    worth: Callable[[Candidate, Sequence[Logits]], str | None] = lambda candidate, logits: None,
    problems: dict[str, str] | None = None,
) -> dict[str, Measured]:
    """Measure every candidate on the same texts (token ids); the first is the reference.

    Each runs in a fresh process with the device's cores. Logits are taken of all texts; speed in `ROUNDS` rounds, under
    1, 16 and 64 clients, in which the candidates take turns, forwards and backwards. `folder` is for scratch files.
    `worth` hears what a candidate answers, and says why its speed need not be known. What cannot run, the first one
    apart, is left out and its reason goes to `problems`; without them it raises the candidate's own error, or JobFailed
    when its process dies. Raises Stopped.
    """
    work = folder / "work.json"
    schedule = plan(texts)
    work.write_text(json.dumps(schedule), encoding="utf-8")
    found: dict[str, Measured] = {}
    timed: list[tuple[Probe, Measured]] = []
    counts: dict[int, int] = {}
    with ExitStack() as stack:
        for number, candidate in enumerate(candidates):
            ctx.report(number, len(candidates) + ROUNDS, stage=f"answers of {candidate.name}")
            try:
                probe, measured, seconds = _answering(candidate, work, folder, len(texts), stack, ctx)
            except LLMOError as error:
                if problems is None or not found:
                    raise
                problems[candidate.name] = f"cannot run: {error.what}"
                continue
            counts = counts or _counts(seconds / len(texts))
            found[candidate.name] = measured
            if worth(candidate, measured.logits) is None:
                timed.append((probe, measured))
        for number in range(ROUNDS):
            ctx.report(len(candidates) + number, len(candidates) + ROUNDS, stage="speed")
            for clients, count in counts.items():
                for probe, measured in timed if number % 2 == 0 else reversed(timed):
                    answer = probe.ask(f"load {clients} {count}")
                    level = measured.levels.setdefault(clients, Level())
                    level.seconds.append(answer["seconds"])
                    level.latencies += answer["latencies"]
                    measured.rss_bytes = answer["rss_bytes"]
    for measured in found.values():
        for clients, level in measured.levels.items():
            level.texts_per_second = min(counts[clients], len(schedule["timed"])) / median(level.seconds)
    return found


def speedup(reference: Measured, other: Measured, clients: int) -> float:
    """The median of the rounds' own ratios: both took their turn in the same moments."""
    pairs = zip(reference.levels[clients].seconds, other.levels[clients].seconds, strict=True)
    return median(theirs / own for theirs, own in pairs)


def plan(texts: Sequence[list[int]]) -> dict[str, Any]:
    """What a measuring process is given: batches of like length to answer all, and evenly spread ones in any order, as
    they come, to time."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    timed = [order[round(i)] for i in np.linspace(0, len(order) - 1, min(len(order), max(MOST_TIMED.values())))]
    np.random.default_rng(SEED).shuffle(timed)
    return {"texts": list(texts), "batches": batches, "timed": timed}


def _counts(seconds: float) -> dict[int, int]:
    """How many texts each number of clients sends, where the first candidate needs so long for one."""
    fits = ROUND_SECONDS / len(CLIENTS) / seconds
    return {clients: int(min(MOST_TIMED[clients], max(LEAST_TIMED, fits))) for clients in CLIENTS}


def _answering(
    candidate: Candidate, work: Path, folder: Path, count: int, stack: ExitStack, ctx: Context
) -> tuple[Probe, Measured, float]:
    """The candidate's process once it has answered all texts, what it showed, and the seconds it took for them."""
    started = time.perf_counter()
    probe = stack.enter_context(Probe(MEASURE, candidate, work, folder, ctx))
    probe.read()
    measured = Measured(ready_seconds=time.perf_counter() - started)
    file = folder / f"{candidate.name}.npz"
    answer = probe.ask(f"answers {file}")
    measured.rss_bytes = answer["rss_bytes"]
    with np.load(file, allow_pickle=False) as kept:
        measured.logits = [kept[str(number)] for number in range(count)]
    file.unlink()
    return probe, measured, answer["seconds"]
