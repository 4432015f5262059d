"""Searches whose trials are a formula, for tests: what a child job would have said, without the job."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

from llmo.jobspecs import TuneJobSpec
from llmo.specs import TaskSpec
from llmo.tuning import space
from llmo.tuning.search import Search, Trial
from llmo.types import JobState, Reason, Result

SPACE: dict[str, Any] = {"learning_rate": {"low": 1e-6, "high": 1e-2, "log": True}, "batch_size": [4, 8, 16, 32]}
STEPS = 90
Outcome = Callable[[Trial, int], Result]


def made(**keys: Any) -> Search:
    """A search over `SPACE` for accuracy, one trial at a time unless told otherwise."""
    spec = TuneJobSpec(task=TaskSpec(name="text-classification"), **({"space": SPACE} | keys))
    dimensions = space.resolve(spec, space.Facts("text-classification", spec.train, 500, 10**6))
    return Search(spec, dimensions, [(space.usual(dimensions, spec.train, spec.task), "usual")])


def quality(trial: Trial) -> float:
    """Best at a learning rate of 1e-3 and a batch of 8."""
    rate, batch = trial.settings["learning_rate"], trial.settings["batch_size"]
    return 0.9 - 0.05 * (math.log10(rate) + 3) ** 2 - 0.01 * abs(math.log2(batch / 8))


def learnt(trial: Trial, part: int) -> Result:
    """Grows with the share of the steps; ends at the first bar that is missed."""
    value, reached = quality(trial) - 0.001 * part, []
    for rung in trial.rungs if part == 0 else []:
        reached.append({"share": rung.share, "value": value * (0.7 + 0.3 * rung.share), "bar": rung.bar})
        if rung.bar is not None and reached[-1]["value"] < rung.bar:
            return done(reached[-1]["value"], reached, reached[-1], round(STEPS * rung.share))
    return done(value, reached)


def done(value: float, rungs: Any = (), pruned: Any = None, steps: int = STEPS, **more: Any) -> Result:
    said = {"metric": "accuracy", "higher_is_better": True, "value": value, "rungs": list(rungs), "pruned": pruned}
    figures = {"steps": steps, "seconds": steps / 10, "memory_bytes": 1 << 20, "latency_ms": None}
    return Result(JobState.DONE, 1, False, None, None, said | figures | more)


def failed(what: str, reason: Reason = Reason.ERROR, code: str = "job_failed") -> Result:
    error = {"code": code, "what": what, "hint": "lower it"}
    return Result(JobState.FAILED, 1, False, None, None, {}, error, reason)


def drive(search: Search, outcome: Outcome = learnt, seed: int = 0) -> Search:
    """Run it to its end; the trials end in an order that `seed` decides."""
    rng = random.Random(seed)
    while search.told < len(search.trials) or not search.closed:
        search.advance()
        if search.running:
            trial = rng.choice(search.running)
            part = rng.choice([part for part in trial.parts if part not in trial.results])
            trial.hear(part, outcome(trial, part))
    return search


def story(search: Search) -> list[Any]:
    return [(t.number, t.settings, t.origin, t.state, t.value, t.rungs) for t in search.trials]
