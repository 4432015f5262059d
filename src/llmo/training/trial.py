"""The operation `trial`: a training of a search, of which the figures on dev are kept and no weights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llmo.context import Context
from llmo.data.dataset import Dataset
from llmo.data.folds import Fold
from llmo.errors import DataError, JobFailed, SpecError
from llmo.jobspecs import RungSpec, TrainJobSpec, TrialSpec
from llmo.methods import METHODS
from llmo.specfile import validate
from llmo.training import checkpoint, peak, relief, scoring
from llmo.training.failures import StepTooLarge, memory_errors
from llmo.training.loop import Loop
from llmo.training.operation import Prepared, prepare, relieved

TIMED_TEXTS, WARM_UP = 32, 3


class _Pruned(Exception):
    """The trial is worse than its bar at this rung."""

    def __init__(self, rung: dict[str, Any]) -> None:
        self.rung = rung


def run(spec: Mapping[str, Any], inputs: Mapping[str, Path], out: Path, ctx: Context) -> dict[str, Any]:
    """`spec` is `TrialSpec.plain()`; `inputs` are the folders `data` and `model`; nothing is written to `out`.

    Returns `metric`, `higher_is_better`, `value` (on dev), `rungs` (`share`, `step`, `value`, `bar`), `pruned` (the
    rung at which it ended, or None), `steps` of `total`, `seconds`, `memory_bytes` at the peak, and `latency_ms` of one
    text if asked. The held-out test rows are not looked at. Raises what the operation `train` raises.
    """
    started = time.monotonic()
    asked = validate(dict(spec), TrialSpec)
    request = TrainJobSpec(**{name: getattr(asked, name) for name in TrainJobSpec.model_fields})
    if METHODS[request.method].trains == "nothing":
        raise SpecError(f"method {request.method} trains nothing", hint="search for the settings of another method")

    def work(request: TrainJobSpec) -> dict[str, Any]:
        ready = prepare(request, _data(asked, inputs["data"]), inputs["model"], ctx)
        _check(ready, asked)
        with memory_errors(StepTooLarge):
            return _train(ready, asked, ctx)

    try:
        found = relieved(request, ctx, work)
    except (JobFailed, MemoryError):
        checkpoint.clear(ctx.checkpoint())  # nobody goes on from here, and there are many trials
        raise
    checkpoint.clear(ctx.checkpoint())
    relief.forget(ctx)
    return {**found, "seconds": time.monotonic() - started}


def _check(ready: Prepared, asked: TrialSpec) -> None:
    """Raises what makes a measurement impossible."""
    if not ready.has_dev:
        raise DataError(
            "a trial is measured on dev, and the dev split is empty", hint="set data.split.dev above 0, or tune.folds"
        )
    if asked.latency and ready.course.task.generates:
        raise SpecError("latency is measured of tasks that answer at once", hint="leave it out of tune.objectives")


def _data(asked: TrialSpec, folder: Path) -> Dataset:
    whole = Dataset.open(folder)
    return whole if asked.fold is None else Fold(whole, **asked.fold.plain())


def _train(ready: Prepared, asked: TrialSpec, ctx: Context) -> dict[str, Any]:
    climb: _Climb | None = None

    def after_step() -> None:
        if climb is not None:
            climb.step()

    loop = ready.loop(ctx, after_step=after_step)
    climb = _Climb(loop, ready, asked.rungs)
    if loop.resume():
        ctx.note(f"resumed from the checkpoint of step {loop.state.step} of {loop.total}")
    objective, pruned = ready.course.objective, None
    try:
        loop.run()
        ready.trained()
        figures = ready.course.figures.full("dev", "dev", ready.course.measured)
        value, metrics = figures[objective.metric]["value"], figures
    except _Pruned as end:
        pruned, value, metrics = end.rung, end.rung["value"], {}
        ctx.note(f"ended at step {loop.state.step} of {loop.total}: {value:.4g}, and the bar is {end.rung['bar']:.4g}")
    return {
        "metric": objective.metric,
        "higher_is_better": objective.higher_is_better,
        "value": value,
        "metrics": metrics,
        "rungs": climb.reached,
        "pruned": pruned,
        "steps": loop.state.step,
        "total": loop.total,
        "samples_per_second": loop.samples_per_second,
        "memory_bytes": peak.peak(ready.chosen.device),
        "latency_ms": _latency(ready) if asked.latency and pruned is None else None,
        "parameters": ready.course.built.parameters,
        "trained_parameters": ready.course.built.trained,
    }


class _Climb:
    """Measures dev at each rung of a run; what it reached is kept in the run's checkpoints."""

    def __init__(self, loop: Loop, ready: Prepared, rungs: list[RungSpec]) -> None:
        self._loop, self._ready = loop, ready
        steps = {max(1, round(rung.share * loop.total)): rung for rung in rungs}
        self._rungs = {step: rung for step, rung in steps.items() if step < loop.total}

    @property
    def reached(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._loop.state.extra.setdefault("rungs", [])
        return found

    def step(self) -> None:
        """Raises _Pruned when the step is a rung's and the value below its bar."""
        step, objective = self._loop.state.step, self._ready.course.objective
        rung = self._rungs.get(step)
        if rung is None or step in [reached["step"] for reached in self.reached]:
            return
        value = self._loop.value_on_dev()
        self._loop.ctx.report(step, self._loop.total, **{f"dev_{objective.metric}": value})
        found = {"share": rung.share, "step": step, "value": value, "bar": rung.bar}
        self.reached.append(found)
        if rung.bar is not None and (value < rung.bar if objective.higher_is_better else value > rung.bar):
            raise _Pruned(found)


def _latency(ready: Prepared) -> float:
    """Milliseconds of one text alone: the median over some of dev."""
    course = ready.course
    predict = scoring.model_predictor(course.built.model, course.task, course.built.pad_id, ready.chosen)
    rows = list(ready.data.split("dev")[: TIMED_TEXTS + WARM_UP])
    times = []
    for encoding in course.task.encode_rows(course.tokenizer, rows):
        began = time.perf_counter()
        predict([encoding])
        times.append(time.perf_counter() - began)
    return 1000.0 * float(np.median(times[WARM_UP:] or times))
