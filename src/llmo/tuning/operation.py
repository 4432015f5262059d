"""The operation `tune`: a parent job whose trials are child jobs, and its report."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmo.context import Context, Stopped
from llmo.data.dataset import Dataset, Rows
from llmo.data.folds import held_out
from llmo.errors import DataError, SpecError
from llmo.jobspecs import FoldSpec, TrialSpec, TuneJobSpec
from llmo.methods import METHODS
from llmo.plugins import operation
from llmo.searchspec import EARLIER, merged, nested
from llmo.specfile import validate
from llmo.training.base import config_of, inspect
from llmo.tuning import report, space
from llmo.tuning.clock import Clock
from llmo.tuning.search import Search, Trial, line
from llmo.tuning.space import Dimension, Facts, Settings

POLL_SECONDS = 0.05
BEST_OF_EARLIER = 3


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` is `TuneJobSpec.plain()`; `inputs` are `data`, `model`, and `earlier-N` (reports of earlier searches).

    Writes the report to `out`, and returns what is in its `report.json`; `settings` are the best ones as the
    specification of a training has them. Raises DataError before any trial for rows that cannot be measured on, the
    first trial's error when none came to an end, and Stopped.
    """
    request = validate(dict(spec), TuneJobSpec)
    data, base = Dataset.open(inputs["data"]), inputs["model"]
    check(request, data)
    parameters = int(inspect(base)["parameters"])
    rows, shape = len(data.split("train")), str(data.info.get("shape"))
    found = space.facts(request.task, request.train, rows, config_of(base), parameters, shape)
    dimensions = space.resolve(request, found)
    for one in dimensions:
        ctx.note(f"varies {one.key}: {one.text()} ({one.why})")
    search = Search(request, dimensions, first(found, request, dimensions, inputs))
    clock = Clock(ctx.checkpoint(), request.budget)
    _Runner(request, search, clock, ctx).run()
    result = report.gather(request, dimensions, search, clock.seconds)
    report.write(out, result)
    return result


def check(request: TuneJobSpec, data: Dataset) -> None:
    """Raises DataError for a data set that trials cannot be measured on, SpecError for a method without settings."""
    if METHODS[request.train.method].trains == "nothing" and "method" not in (request.space or {}):
        raise SpecError(
            f"method {request.train.method} trains nothing, so there are no settings to search for",
            hint="set train.method to another, or leave out tune",
        )
    if request.folds is not None:
        rows = list(Rows.joined([data.split("train"), data.split("dev")]))
        held_out(rows, index=0, of=request.folds, seed=request.seed)
    elif not len(data.split("dev")):
        raise DataError(
            "a search measures its trials on dev, and the dev split is empty",
            hint="set data.split.dev above 0, or tune.folds to cross-validate",
        )


def first(
    facts: Facts, request: TuneJobSpec, dimensions: Sequence[Dimension], inputs: Mapping[str, Path]
) -> list[tuple[Settings, str]]:
    """What is tried before anything is drawn: the usual settings, and the best of each earlier search."""
    found = [(space.usual(dimensions, facts.train, request.task), "usual")]
    for name in sorted(name for name in inputs if name.startswith(EARLIER)):
        earlier = json.loads((inputs[name] / report.FILE).read_text(encoding="utf-8"))
        done = [trial for trial in earlier["trials"] if trial["state"] == "done"]
        done.sort(key=lambda trial: trial["value"], reverse=earlier["higher_is_better"])
        for trial in done[:BEST_OF_EARLIER]:
            settings = {one.key: trial["settings"].get(one.key) for one in dimensions}
            fitting = {one.key: settings[one.key] for one in dimensions if one.holds(settings[one.key])}
            found.append((fitting, "earlier search"))
    return [(settings, origin) for settings, origin in found if settings]


class _Runner:
    """Lets the children of a search begin, hears them, and ends them when the time is over."""

    def __init__(self, request: TuneJobSpec, search: Search, clock: Clock, ctx: Context) -> None:
        self._request, self._search, self._clock, self._ctx = request, search, clock, ctx
        self._known = clock.told  # an earlier attempt said what became of these
        self._begun: set[str] = set()
        self._stopped: set[str] = set()

    def run(self) -> None:
        search = self._search
        while search.told < len(search.trials) or not search.closed:
            if self._clock.over:
                self._end()
            told = search.advance()
            self._clock.keep(begun=len(search.trials), told=search.told)
            for trial in told:
                if trial.number >= self._known:
                    self._ctx.note(line(trial))
            if told:
                self._say()
            for trial in search.running:
                self._go_on(trial)
            if self._ctx.should_stop():
                raise Stopped
            if not told:
                time.sleep(POLL_SECONDS)

    def _go_on(self, trial: Trial) -> None:
        for part in trial.parts:
            key = trial.key(part)
            if key not in self._begun:
                needs = replace(operation("trial").needs, cores_max=self._request.cores)
                inputs = {name: f"input:{name}" for name in ("data", "model")}
                self._ctx.spawn(key, "trial", self._spec(trial, part), inputs, needs=needs)
                self._begun.add(key)
            if part not in trial.results and (result := self._ctx.result(key)) is not None:
                trial.hear(part, result)
        if trial.doomed:
            self._stop(trial)

    def _spec(self, trial: Trial, part: int) -> dict[str, Any]:
        plain = {**self._request.train.plain(), "task": self._request.task.plain()}
        fold = FoldSpec(index=part, of=trial.folds, seed=self._request.seed) if trial.folds > 1 else None
        about = {
            "fold": None if fold is None else fold.plain(),
            "rungs": [rung.plain() for rung in trial.rungs] if part == 0 else [],
            "latency": "latency" in self._request.objectives,
        }
        return validate(merged(plain, nested(trial.settings)) | about, TrialSpec).plain()

    def _end(self) -> None:
        """The time is over: nothing begins any more, and what runs is stopped, but for one where nothing is done."""
        self._search.most = max(1, self._clock.begun, len(self._search.trials))  # by an earlier attempt, perhaps
        running = self._search.running
        for trial in running if self._search.done else running[1:]:
            self._stop(trial)

    def _stop(self, trial: Trial) -> None:
        """Stop what is still trained for a trial."""
        for part in range(trial.folds):
            key = trial.key(part)
            if part not in trial.results and key in self._begun - self._stopped:
                self._ctx.stop(key)
                self._stopped.add(key)

    def _say(self) -> None:
        search = self._search
        shown = {"best": search.best().value or 0.0} if search.done else {}
        most = self._request.trials or (None if self._request.budget else self._request.most)
        self._ctx.report(search.told, most, **shown)
