"""Which settings are tried next: Optuna behind three methods. The same questions and answers give the same settings."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from llmo.tuning import space
from llmo.tuning.space import Dimension, Settings
from llmo.types import canonical

TRIES = 20  # settings that were tried before are drawn anew so often
UNKNOWN = 40  # trials that are counted with where only a time limits them

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Sampler:
    """`first` are settings (or a part of them) to try before any that are drawn; no settings are given out twice."""

    def __init__(
        self,
        dimensions: Sequence[Dimension],
        kind: str,
        *,
        seed: int,
        trials: int | None,
        objectives: int = 1,
        first: Sequence[tuple[Settings, str]] = (),
    ) -> None:
        self._dimensions = {one.key: one for one in dimensions}
        self._distributions = {one.key: _drawn_from(one) for one in dimensions}
        self._several = objectives > 1
        self._study = optuna.create_study(
            directions=["maximize"] * objectives,
            sampler=_sampler(kind, seed, trials or UNKNOWN),
            pruner=optuna.pruners.NopPruner(),
        )
        self._seen: set[str] = set()
        self._asked: dict[int, optuna.Trial] = {}
        self._queue = list(first)
        self._rest: list[Settings] | None = None
        if kind == "grid":
            points = space.grid(dimensions)
            random.Random(seed).shuffle(points)
            self._queue, self._rest = [(point, "grid") for point in points], []
        self._shuffle = random.Random(seed)
        self._given: dict[int, Settings] = {}
        self._best: tuple[float, Settings] | None = None

    def ask(self, number: int) -> tuple[Settings, str] | None:
        """The settings of trial `number` and where they come from; None when everything was tried."""
        while self._queue:
            fixed, origin = self._queue.pop(0)
            found = self._draw(number, fixed)
            if found is not None:
                return found, origin
        if self._rest is None:
            for _ in range(TRIES):
                found = self._draw(number)
                if found is not None:
                    return found, "drawn"
            self._rest = space.combinations(list(self._dimensions.values())) or []
            self._shuffle.shuffle(self._rest)
        while self._rest:
            found = self._draw(number, self._rest.pop(self._nearest(self._rest)))
            if found is not None:
                return found, "left over"
        return None

    def tell(self, number: int, scores: Sequence[float]) -> None:
        """A trial was finished; greater is better in each objective."""
        self._study.tell(self._asked.pop(number), list(scores))
        if self._best is None or scores[0] > self._best[0]:
            self._best = scores[0], self._given[number]

    def tell_pruned(self, number: int, reached: Sequence[tuple[float, float]]) -> None:
        """A trial ended early, having `reached` scores at shares of its steps; with none it counts as the worst."""
        trial = self._asked.pop(number)
        if self._several:
            self._study.tell(trial, state=TrialState.FAIL)
            return
        for share, score in reached:
            trial.report(score, round(1000 * share))
        self._study.tell(trial, state=TrialState.PRUNED)

    def tell_nothing(self, number: int) -> None:
        """Nothing is known of a trial."""
        self._study.tell(self._asked.pop(number), state=TrialState.FAIL)

    def _draw(self, number: int, fixed: Settings | None = None) -> Settings | None:
        if fixed is not None:
            self._study.enqueue_trial({key: self._written(key, value) for key, value in fixed.items()})
        trial = self._study.ask(self._distributions)
        settings = {key: self._readable(key, value) for key, value in trial.params.items()} | (fixed or {})
        if (name := canonical(settings)) in self._seen:
            self._study.tell(trial, state=TrialState.FAIL)
            return None
        self._seen.add(name)
        self._asked[number], self._given[number] = trial, settings
        return settings

    def _nearest(self, rest: Sequence[Settings]) -> int:
        """Which of what is left over is most like the best one so far."""
        best = self._best[1] if self._best is not None else {}

        def apart(number: int) -> float:
            return sum(one.apart(rest[number][key], best.get(key)) for key, one in self._dimensions.items())

        return min(range(len(rest)), key=apart)

    def _readable(self, key: str, value: Any) -> Any:
        one = self._dimensions[key]
        if one.values is None:
            return one.readable(value)
        return one.values[value] if one.ordered else value

    def _written(self, key: str, value: Any) -> Any:
        """The inverse, of what is one of the dimension's."""
        one = self._dimensions.get(key)
        return one.values.index(value) if one is not None and one.values is not None and one.ordered else value


def distribution(one: Dimension) -> BaseDistribution:
    if one.values is not None:
        return CategoricalDistribution(list(one.values))
    if one.whole:
        return IntDistribution(int(one.low), int(one.high), log=one.log, step=int(one.step or 1))
    return FloatDistribution(one.low, one.high, log=one.log, step=one.step)


def _drawn_from(one: Dimension) -> BaseDistribution:
    """Of ordered values their places: a sampler that learns then knows which are next to each other."""
    return IntDistribution(0, len(one.values) - 1) if one.values is not None and one.ordered else distribution(one)


def _sampler(kind: str, seed: int, trials: int) -> optuna.samplers.BaseSampler:
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(population_size=max(4, min(50, trials // 4)), seed=seed)
    if kind == "tpe":
        begin = min(10, max(3, trials // 4))
        return optuna.samplers.TPESampler(n_startup_trials=begin, multivariate=True, constant_liar=True, seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)
