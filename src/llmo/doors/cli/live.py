"""Live progress of a tree of jobs: bars with time left in a terminal, one line per change elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from llmo.doors.cli.show import console, seconds, shorten
from llmo.doors.flow import News
from llmo.types import Event, Job, JobState, Reason

SHOWN = ("loss", "learning_rate", "samples_per_second", "texts_per_second", "step")


class Live:
    """Pass an instance's `hear` to `flow.wait`. Quiet in `--json` mode."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bars: dict[int, TaskID] = {}
        self._states: dict[int, str] = {}
        self._waiting: dict[int, str] = {}
        self._progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[metrics]}"),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._progress.stop()

    def hear(self, news: News) -> None:
        if self._quiet:
            return
        jobs = news.children | {news.root.id: news.root}
        for event in news.events:
            job = jobs.get(event.job)
            if job is not None and job.op != "pipeline":
                self._event(job, event)
        for job in jobs.values():
            if job.op != "pipeline":
                self._state(job)

    def _event(self, job: Job, event: Event) -> None:
        if event.kind == "progress":
            self._move(job, event.data)
        elif event.kind == "note":
            console.print(f"  [dim]{label(job)}[/] {event.data.get('text', '')}", markup=True, soft_wrap=True)

    def _move(self, job: Job, data: Any) -> None:
        metrics = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else str(value)
            for name, value in data.items()
            if name in SHOWN
        )
        if job.id not in self._bars:
            self._bars[job.id] = self._progress.add_task(f"{label(job):<10}", total=data.get("total"), metrics="")
        self._progress.update(
            self._bars[job.id], completed=data.get("step", 0), total=data.get("total"), metrics=shorten(metrics, 60)
        )

    def _state(self, job: Job) -> None:
        if job.state is JobState.QUEUED and job.waiting and self._waiting.get(job.id) != job.waiting:
            self._waiting[job.id] = job.waiting
            console.print(f"  [dim]{label(job)}[/] waits: {job.waiting}", soft_wrap=True)
        mark = self._ended(job)
        if mark is None or self._states.get(job.id) == mark:
            return
        self._states[job.id] = mark
        if job.id in self._bars:
            self._progress.remove_task(self._bars.pop(job.id))
        console.print(mark, soft_wrap=True)

    @staticmethod
    def _ended(job: Job) -> str | None:
        took = seconds((job.ended_at or 0) - job.started_at) if job.started_at and job.ended_at else ""
        if job.state is JobState.DONE:
            done = "found, nothing changed" if job.reason is Reason.CACHED else took
            return f"[green]✓[/] {label(job):<10} [dim]{done}[/]"
        if job.service and job.state is JobState.RUNNING and job.address:
            return f"[green]✓[/] {label(job):<10} [dim]answers[/]"
        if job.state in (JobState.FAILED, JobState.STOPPED):
            return f"[red]✗[/] {label(job):<10} {job.state.value}: {job.reason.value if job.reason else ''} {took}"
        return None


def label(job: Job) -> str:
    """What people call a job: its step in the pipeline, else its operation."""
    return job.child_key or job.op
