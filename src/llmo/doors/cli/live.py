"""Live progress of a tree of jobs: bars with time left in a terminal, one line per change elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from llmo.api import Api
from llmo.doors import flow
from llmo.doors.cli.show import console, seconds
from llmo.doors.cli.trials import Trials
from llmo.doors.flow import News
from llmo.types import Event, Job, JobState, Reason

SHOWN = {
    "loss": "loss",
    "train_loss": "loss",
    "samples_per_second": "samples/s",
    "texts_per_second": "texts/s",
    "learning_rate": "lr",
    "best": "best",
}
DEV_SHOWN = 2  # of the metrics that an evaluation on dev measured
LOOK_SECONDS = 0.5  # between two looks at the trials of a search
TRIALS = 1000
QUIET_SECONDS = 5.0  # at least so long between two lines about dev


class _Count(ProgressColumn):
    """Steps done of all, or nothing while they are not known."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:.0f}/{task.total:.0f}" if task.total else "", style="progress.download")


class _Metrics(ProgressColumn):
    """What was last measured; the one column that gives way in a narrow terminal."""

    def __init__(self) -> None:
        super().__init__(Column(overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        return Text(str(task.fields["metrics"]), style="dim", no_wrap=True, overflow="ellipsis")


class _Progress(Progress):
    """Bars, and above them the trials of a search."""

    def __init__(self, trials: Trials, *columns: ProgressColumn, **options: Any) -> None:
        self._trials = trials
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        trials = self._trials.table()
        if trials is not None:
            yield trials
        yield from super().get_renderables()


class Live:
    """Pass an instance's `hear` to `flow.wait`. Quiet in `--json` mode."""

    def __init__(self, api: Api, *, quiet: bool = False) -> None:
        self._api = api
        self._quiet = quiet
        self._root: Job | None = None
        self._bars: dict[tuple[int, str], TaskID] = {}
        self._metrics: dict[int, dict[str, str]] = {}
        self._told_dev: dict[int, float] = {}
        self._states: dict[int, str] = {}
        self._waiting: dict[int, str] = {}
        fixed = Column(no_wrap=True)
        self._trials = Trials()
        self._looked = 0.0
        self._progress = _Progress(
            self._trials,
            SpinnerColumn(finished_text=" ", table_column=fixed),
            TextColumn("{task.description}", table_column=fixed),
            BarColumn(bar_width=16, table_column=fixed),
            _Count(fixed),
            TimeRemainingColumn(compact=True, table_column=fixed),
            _Metrics(),
            TextColumn("  ", table_column=fixed),  # room for the terminal's own ^C, which else moves the cursor on
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()
        if kind is KeyboardInterrupt and self._root is not None:
            sys.stderr.write(_parting(self._root, goes_on=flow.goes_on(self._api)))

    def hear(self, news: News) -> None:
        self._root = news.root
        if self._quiet:
            return
        jobs = news.children | {news.root.id: news.root}
        self._look_at_trials(jobs.values())
        for event in news.events:
            job = jobs.get(event.job)
            if job is None and self._trials.event(event):
                continue
            if job is not None and job.op != "pipeline":
                self._event(job, event)
        for job in jobs.values():
            self._waits(job)
            if job.op != "pipeline":
                self._state(job)

    def _look_at_trials(self, jobs: Iterable[Job]) -> None:
        """The jobs of a search are children of one of ours."""
        search = next((job for job in jobs if job.op == "tune" and not job.state.ended), None)
        if search is None:
            self._trials.hear([])
        elif time.monotonic() - self._looked >= LOOK_SECONDS:
            self._looked = time.monotonic()
            self._trials.hear(self._api.jobs(parent=search.id, limit=TRIALS), sorted(search.spec.get("space") or {}))

    def _event(self, job: Job, event: Event) -> None:
        if event.kind == "progress":
            self._move(job, event)
        elif event.kind == "note":
            self._say(job, str(event.data.get("text", "")))
        elif event.kind == "state" and event.data.get("state") == JobState.QUEUED and event.data.get("text"):
            self._say(job, f"is tried again: {event.data['text']}")

    def _move(self, job: Job, event: Event) -> None:
        data = event.data
        metrics = self._metrics.setdefault(job.id, {})
        metrics |= _metrics(data)
        if any(name.startswith("dev_") for name in data) and event.at - self._told_dev.get(job.id, 0) > QUIET_SECONDS:
            self._told_dev[job.id] = event.at
            measured = ", ".join(f"{name} {value}" for name, value in _metrics(data).items())
            self._say(job, f"step {data.get('step')} of {data.get('total')}: {measured}")
        phase = str(data.get("phase", ""))
        for key in [key for key in self._bars if key[0] == job.id and key[1] not in ("", phase)]:
            self._progress.remove_task(self._bars.pop(key))
        shown = ", ".join(f"{name} {value}" for name, value in metrics.items())
        self._bar(job, phase, shown if not phase else "", data.get("step", 0), data.get("total"))

    def _bar(self, job: Job, phase: str, metrics: str, step: int, total: int | None) -> None:
        """One bar for the job and, beneath it, one for what it does in between (a phase)."""
        key = (job.id, phase)
        if key not in self._bars:
            name = f"{label(job)}: {phase}" if phase else label(job)
            self._bars[key] = self._progress.add_task(escape(f"{name:<10}"), total=total, metrics="")
        self._progress.update(self._bars[key], completed=step, total=total, metrics=metrics)

    def _waits(self, job: Job) -> None:
        held_up = job.state is JobState.QUEUED or (job.op != "pipeline" and not job.state.ended)
        if held_up and job.waiting and self._waiting.get(job.id) != job.waiting:
            self._waiting[job.id] = job.waiting
            self._say(job, "waits: " + job.waiting.removeprefix("waits for ").removeprefix("waits: "))

    def _state(self, job: Job) -> None:
        if job.state in (JobState.STARTING, JobState.RUNNING) and (job.id, "") not in self._bars and not job.address:
            self._bar(job, "", "", 0, None)
        mark = self._ended(job)
        if mark is None or self._states.get(job.id) == mark:
            return
        self._states[job.id] = mark
        for key in [key for key in self._bars if key[0] == job.id]:
            self._progress.remove_task(self._bars.pop(key))
        console.print(mark, soft_wrap=True)

    @staticmethod
    def _say(job: Job, text: str) -> None:
        console.print(f"  [dim]{escape(label(job))}[/] {escape(text)}", soft_wrap=True)

    @staticmethod
    def _ended(job: Job) -> str | None:
        took = seconds((job.ended_at or 0) - job.started_at) if job.started_at and job.ended_at else ""
        name = f"{label(job):<10}"
        if job.state is JobState.DONE:
            done = "found, nothing changed" if job.reason is Reason.CACHED else took
            return f"[green]✓[/] {name} [dim]{done}[/]"
        if job.service and job.state is JobState.RUNNING and job.address:
            return f"[green]✓[/] {name} [dim]answers[/]"
        if job.state in (JobState.FAILED, JobState.STOPPED):
            known = job.reason not in (None, Reason.ERROR, Reason.USER)
            why = f": {job.reason.value.replace('_', ' ')}" if known and job.reason else ""
            return f"[red]✗[/] {name} {job.state.value}{why} [dim]{took}[/]"
        return None


def label(job: Job) -> str:
    """What people call a job: its step in the pipeline, else its operation."""
    return job.child_key or (job.name if job.op == "pipeline" else job.op)


def _metrics(data: Mapping[str, Any]) -> dict[str, str]:
    found = {SHOWN[name]: f"{value:.4g}" for name, value in data.items() if name in SHOWN and _number(value)}
    dev = [(name, value) for name, value in data.items() if name.startswith("dev_") and _number(value)]
    return found | {name.replace("_", " "): f"{value:.3f}" for name, value in dev[:DEV_SHOWN]}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parting(root: Job, *, goes_on: bool) -> str:
    if goes_on:
        return f"job {root.id} goes on at the server; watch it: llmo logs -f {root.id}, stop it: llmo kill {root.id}\n"
    return "stopped; what was finished is kept, and the same command goes on from there\n"


def follow(api: Api, job: Job, as_json: bool) -> Job:
    """As `flow.wait`, with its progress shown."""
    with Live(api, quiet=as_json) as live:
        return flow.wait(api, job, live.hear)
