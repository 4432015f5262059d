"""A search as a pure function of its specification and of what its trials came to, told in the order of their numbers.

Trial n is chosen when all trials up to n - `ahead` have ended, and only those are known to whoever chooses. So a search
that is started again asks for the same trials with the same settings, finds what is done by its key, and needs no
record of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llmo.errors import JobFailed, LLMOError, NeedsError
from llmo.errors import from_json as error_from_json
from llmo.jobspecs import RungSpec, TuneJobSpec
from llmo.searchspec import COSTS
from llmo.tuning import pruner, space
from llmo.tuning.sampler import Sampler
from llmo.tuning.space import Dimension, Settings
from llmo.types import JobState, Reason, Result

ALIKE = 3  # trials that fail for the same reason before any other ends: no settings will help


@dataclass(slots=True)
class Trial:
    """Settings that are tried: a training, or one for each fold. `state` is running | done | pruned | failed | stopped,
    `value` the metric on dev (the mean of the folds, `spread` their standard deviation)."""

    number: int
    settings: Settings
    origin: str
    rungs: list[RungSpec]
    folds: int
    results: dict[int, Result] = field(default_factory=dict)
    state: str = "running"
    reason: str = ""
    value: float | None = None
    spread: float | None = None

    @property
    def parts(self) -> list[int]:
        """The trainings that are wanted. With rungs the first fold decides whether the others are trained."""
        first = self.results.get(0)
        alone = self.rungs and (first is None or _broken(first) or first.result["pruned"] is not None)
        return [0] if alone else list(range(self.folds))

    @property
    def doomed(self) -> bool:
        """Whether one of its trainings went wrong, so that nothing will come of the others."""
        return any(_broken(result) for result in self.results.values())

    def key(self, part: int) -> str:
        """What the child job of a part is called."""
        return f"trial-{self.number}" + (f"-fold-{part}" if self.folds > 1 else "")

    def figure(self, name: str) -> float | None:
        """A figure over all parts: the sum of steps and seconds, the most memory, the mean latency."""
        found = [result.result[name] for result in self._ordered() if result.result.get(name) is not None]
        if not found:
            return None
        if name in ("steps", "seconds"):
            return float(sum(found))
        return float(max(found)) if name == "memory_bytes" else float(np.mean(found))

    def hear(self, part: int, result: Result) -> None:
        """What a training came to. The trial ends with the last one that is wanted, whichever that is."""
        self.results[part] = result
        if all(wanted in self.results for wanted in self.parts):
            self._end()

    def _end(self) -> None:
        bad = sorted((r for r in self._ordered() if _broken(r)), key=lambda r: r.state is JobState.STOPPED)
        end = self.results[0].result.get("pruned") if 0 in self.results else None
        if bad and bad[0].state is JobState.STOPPED:
            self.state, self.reason = "stopped", "before its end"
        elif bad and bad[0].reason is Reason.OUT_OF_MEMORY:
            self.state, self.reason = "pruned", "out of memory"
        elif bad:
            error = bad[0].error or {}
            # What surely would run out of memory is refused before it begins.
            self.state = "pruned" if error.get("code") == NeedsError.code else "failed"
            self.reason = str(error.get("what") or "no reason given")
        elif end is not None:
            self.state, self.value = "pruned", end["value"]
            self.reason = f"{end['value']:.4g} after {end['share']:.0%} of its steps; the bar was {end['bar']:.4g}"
        else:
            values = [result.result["value"] for result in self._ordered()]
            self.state, self.value = "done", float(np.mean(values))
            self.spread = float(np.std(values)) if self.folds > 1 else None

    def _ordered(self) -> list[Result]:
        """By fold, not by when they came: sums of the same numbers in another order differ in their last bits."""
        return [result for _, result in sorted(self.results.items())]


def _broken(result: Result) -> bool:
    return result.state is not JobState.DONE


class Search:
    """`first` are settings to begin with. The caller trains the `parts` of what is `running`, and lets each trial
    `hear` the results."""

    def __init__(
        self, spec: TuneJobSpec, dimensions: Sequence[Dimension], first: Sequence[tuple[Settings, str]]
    ) -> None:
        self.trials: list[Trial] = []
        self.told = 0  # trials that were told to the sampler, from the first on
        self.closed = False  # nothing more will begin
        self.most = spec.most  # trials; lowered when the time is over
        self._spec = spec
        self._ahead = spec.width + spec.width // 2
        self._sampler = Sampler(
            dimensions,
            spec.sampler,
            seed=spec.seed,
            trials=spec.trials or (None if spec.budget else spec.most),
            objectives=len(spec.objectives),
            first=first,
        )
        self._standings: dict[float, list[float]] = defaultdict(list)

    @property
    def running(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == "running"]

    @property
    def done(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == "done"]

    @property
    def higher_is_better(self) -> bool:
        return bool(self.said("higher_is_better", True))

    def said(self, name: str, otherwise: Any = None) -> Any:
        """What the first trial that came to an end said of all trials alike."""
        found = (r.result[name] for trial in self.trials for r in trial.results.values() if name in r.result)
        return next(found, otherwise)

    def advance(self) -> list[Trial]:
        """Let trials begin, and tell the sampler of those that ended, each after all before it; returns these.

        What a trial is chosen by must not depend on when this is called, so one is told at a time, and the next begun.
        """
        told: list[Trial] = []
        self._begin()
        while self.told < len(self.trials) and self.trials[self.told].state != "running":
            told.append(self.trials[self.told])
            self._tell(told[-1])
            self.told += 1
            self._give_up()
            self._begin()
        return told

    def _begin(self) -> None:
        while not self.closed and len(self.trials) - self.told < self._ahead:
            number = len(self.trials)
            drawn = self._sampler.ask(number) if number < self.most else None
            if drawn is None:
                self.closed = True
                return
            sign = 1.0 if self.higher_is_better else -1.0
            epochs = drawn[0].get("epochs", self._spec.train.epochs)
            bars = pruner.bars(self._spec.prunes, number, epochs, self._standings)
            rungs = [RungSpec(share=share, bar=None if bar is None else sign * bar) for share, bar in bars]
            self.trials.append(Trial(number, *drawn, rungs, self._spec.folds or 1))

    def best(self) -> Trial:
        """Of the best quality. Raises the first trial's own error when none came to an end."""
        if self.done:
            sign = 1.0 if self.higher_is_better else -1.0
            return max(self.done, key=lambda trial: (sign * (trial.value or 0.0), -trial.number))
        raise self._nothing()

    def front(self) -> list[Trial]:
        """The trials that no other one beats in every objective, best quality first."""
        scores = {trial.number: self._scores(trial) for trial in self.done}
        kept = [
            trial
            for trial in self.done
            if not any(
                all(a >= b for a, b in zip(other, scores[trial.number], strict=True)) and other != scores[trial.number]
                for other in scores.values()
            )
        ]
        return sorted(kept, key=lambda trial: (-scores[trial.number][0], trial.number))

    def _scores(self, trial: Trial) -> list[float]:
        """Greater is better, quality first."""
        sign = 1.0 if self.higher_is_better else -1.0
        costs = [trial.figure(COSTS[name]) for name in self._spec.objectives if name != "quality"]
        return [sign * (trial.value or 0.0), *(-(cost or 0.0) for cost in costs)]

    def _tell(self, trial: Trial) -> None:
        sign = 1.0 if self.higher_is_better else -1.0
        first = trial.results.get(0)
        rungs = first.result.get("rungs", []) if first is not None else []
        reached = [(float(rung["share"]), sign * float(rung["value"])) for rung in rungs]
        for share, score in reached:
            self._standings[share].append(score)
        if trial.state == "done":
            self._sampler.tell(trial.number, self._scores(trial))
        elif trial.state == "stopped":
            self._sampler.tell_nothing(trial.number)
        else:
            self._sampler.tell_pruned(trial.number, reached if trial.value is not None else [])

    def _give_up(self) -> None:
        ended = self.trials[: self.told]
        reasons = {trial.reason for trial in ended}
        if len(ended) >= ALIKE and len(reasons) == 1 and all(trial.state == "failed" for trial in ended):
            self.closed = True

    def _nothing(self) -> LLMOError:
        failed = [trial for trial in self.trials if trial.state == "failed"]
        error = next((r.error for trial in failed for r in trial.results.values() if r.error is not None), None)
        if error is not None:
            found = error_from_json(dict(error))
            found.what = f"no trial came to an end, {len(failed)} of {len(self.trials)} failed: {found.what}"
            return found
        if any(trial.state == "stopped" for trial in self.trials):
            return JobFailed("no trial ended within the budget", hint="raise tune.budget, or train on fewer rows first")
        return JobFailed(
            f"none of {len(self.trials)} trials came to an end: {self.trials[0].reason}",
            hint="lower batch_size or max_length in tune.space, or free memory",
        )


def record(trial: Trial) -> dict[str, Any]:
    """A trial as the report has it."""
    first: Mapping[str, Any] = trial.results[0].result if 0 in trial.results else {}
    return {
        "number": trial.number,
        "origin": trial.origin,
        "settings": trial.settings,
        "state": trial.state,
        "reason": trial.reason,
        "value": trial.value,
        "spread": trial.spread,
        "rungs": first.get("rungs", []),
        "steps": trial.figure("steps"),
        "seconds": trial.figure("seconds"),
        "memory_bytes": trial.figure("memory_bytes"),
        "latency_ms": trial.figure("latency_ms"),
        "jobs": [trial.results[part].job for part in sorted(trial.results)],
    }


def line(trial: Trial) -> str:
    """A trial that ended, in one line."""
    said = {"done": "", "pruned": "ended early: ", "failed": "failed: ", "stopped": "stopped: "}[trial.state]
    figure = f"{trial.value:.4f}" if trial.state == "done" else said + trial.reason
    return f"trial {trial.number}: {figure} ({space.words(trial.settings)})"
