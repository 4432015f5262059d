"""The trials of a search in a terminal: a table that moves while it runs, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from llmo.doors.cli.show import console, grid_of, seconds, size, table
from llmo.searchspec import COSTS
from llmo.types import Event, Job, JobState

SHOWN = 12  # rows of a moving table


class Trials:
    """What is known of the child jobs of a search; `hear` and `event` keep it new."""

    def __init__(self) -> None:
        self._jobs: dict[int, Job] = {}
        self._settings: dict[int, str] = {}
        self._progress: dict[int, Mapping[str, Any]] = {}

    def hear(self, children: Sequence[Job], keys: Sequence[str] = ()) -> None:
        """The jobs as they are now; `keys` are what is varied, where that is known, else what differs is shown."""
        self._jobs = {job.id: job for job in children}
        flat = {job.id: _flat(job.spec) for job in children}
        names = dict.fromkeys(key for one in flat.values() for key in one)
        differing = [key for key in names if len({repr(one.get(key)) for one in flat.values()}) > 1]
        shown = list(keys) or differing
        self._settings = {id: ", ".join(f"{key} {_short(one.get(key))}" for key in shown) for id, one in flat.items()}

    def event(self, event: Event) -> bool:
        """True for progress of one of the trials."""
        if event.job in self._jobs and event.kind == "progress" and "phase" not in event.data:
            self._progress[event.job] = event.data
        return event.job in self._jobs

    def table(self) -> RenderableType | None:
        """Those that run, and the best of those that ended."""
        running = [job for job in self._jobs.values() if job.state in (JobState.STARTING, JobState.RUNNING)]
        ended = sorted((job for job in self._jobs.values() if job.state is JobState.DONE), key=_merit)
        rows = [self._row(job) for job in [*sorted(running, key=lambda job: job.id), *ended][:SHOWN]]
        return grid_of(["trial", "state", "dev>", "steps>", "time>", "settings"], rows) if rows else None

    def _row(self, job: Job) -> tuple[str, ...]:
        told, result = self._progress.get(job.id, {}), job.result or {}
        pruned = result.get("pruned")
        state = "runs" if job.result is None else "ended early" if pruned else "done"
        value = result.get("value")
        took = seconds((job.ended_at or 0) - job.started_at) if job.started_at and job.ended_at else ""
        steps = result.get("steps", told.get("step", 0))
        total = result.get("total", told.get("total")) or "?"
        name = str(job.child_key).removeprefix("trial-").replace("-", " ")
        shown = "" if value is None else f"{value:.4f}"
        return name, state, shown, f"{steps}/{total}", took, self._settings[job.id]


def show_search(found: Mapping[str, Any]) -> None:
    """The report of a search, for people."""
    counts = ", ".join(f"{count} {name}" for name, count in found["counts"].items() if count)
    costs = [name for name in found["objectives"] if name != "quality"]
    best, several = found["best"], bool(found["front"])
    shown = [t for t in found["trials"] if t["number"] in found["front"]] if several else _ranked(found)[:5]
    columns = ["trial", f"{found['metric']} on dev>", *(f"{name}>" for name in costs), "steps>", "settings"]
    rows = [
        (
            trial["number"],
            _value(trial),
            *(_cost(name, trial[COSTS[name]]) for name in costs),
            f"{trial['steps']:.0f}",
            ", ".join(f"{key} {_short(value)}" for key, value in trial["settings"].items()),
        )
        for trial in shown
    ]
    table("Pareto front" if several else "the best trials", columns, rows)
    if found["importance"]:
        shares = ", ".join(f"{key} {share:.0%}" for key, share in found["importance"].items())
        console.print(f"what mattered: {shares}", soft_wrap=True)
    for trial in found["trials"]:
        if trial["state"] == "failed":
            console.print(f"trial {trial['number']} failed: {trial['reason']}", markup=False, soft_wrap=True)
    console.print(f"{counts}; {found['steps']} steps in {seconds(found['seconds'])}", soft_wrap=True)
    settings = ", ".join(f"{key}: {_short(value)}" for key, value in best["settings"].items())
    console.print(f"[bold]best[/] trial {best['number']}: {escape(settings)}\n", soft_wrap=True)


def _ranked(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    done = [trial for trial in found["trials"] if trial["state"] == "done"]
    return sorted(done, key=lambda trial: trial["value"], reverse=found["higher_is_better"])


def _value(trial: Mapping[str, Any]) -> str:
    spread = f" ± {trial['spread']:.4f}" if trial["spread"] is not None else ""
    return f"{trial['value']:.4f}{spread}"


def _cost(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return size(value) if name == "memory" else f"{value:.1f} ms" if name == "latency" else seconds(value)


def _merit(job: Job) -> tuple[bool, float]:
    """The best first, those that ended early last."""
    result = job.result or {}
    value = float(result.get("value") or 0.0)
    return bool(result.get("pruned")), -value if result.get("higher_is_better", True) else value


def _flat(spec: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in spec.items():
        if isinstance(value, Mapping) and key != "fold":
            found |= _flat(value, "" if key == "task" else f"{key}.")
        elif key not in ("fold", "rungs"):
            found[f"{prefix}{key}"] = value
    return found


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
