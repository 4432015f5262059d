"""The trials of a search in a terminal: those that run, the best of those that ended, and the report."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from typing import Any

import pytest
from rich.console import Console

from llmo.doors.cli import live, show, trials
from llmo.doors.flow import News
from llmo.types import Event, Job, JobState, Needs


def trial(number: int, rate: float, result: dict[str, Any] | None = None) -> Job:
    said = None if result is None else {"higher_is_better": True, "pruned": None, "steps": 90, "total": 90, **result}
    state = JobState.RUNNING if result is None else JobState.DONE
    spec = {"learning_rate": rate, "epochs": 3.0, "lora": {"rank": 8}, "task": {"name": "t"}, "rungs": [number]}
    return Job(10 + number, "trial", spec, {}, Needs(), state, child_key=f"trial-{number}", result=said)


class Searching:
    """As much of an API as progress asks of a search."""

    def __init__(self, found: Sequence[Job]) -> None:
        self._found = list(found)

    def jobs(self, *, parent: int, limit: int) -> list[Job]:
        assert (parent, limit >= 1000) == (2, True)
        return self._found


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    made = Console(file=out, force_terminal=True, width=100, height=30, color_system=None)
    for module in (live, trials, show):
        monkeypatch.setattr(module, "console", made)
    return out


def test_the_trials_are_shown_while_they_run(screen: io.StringIO) -> None:
    pruned = {"value": 0.4, "pruned": {"share": 0.1}, "steps": 10}
    found = [trial(0, 1e-4, {"value": 0.81}), trial(1, 1e-2, pruned), trial(2, 3e-4, {"value": 0.9}), trial(3, 1e-3)]
    search = Job(2, "tune", {}, {}, Needs(), JobState.RUNNING, child_key="tune")
    events = [Event(1, 13, 1, time.time(), "progress", {"step": 12, "total": 90, "loss": 0.5})]
    with live.Live(Searching(found)) as shown:  # type: ignore[arg-type]
        shown.hear(News(Job(1, "pipeline", {}, {}, Needs(), JobState.RUNNING), {2: search}, events))
        shown._progress.refresh()
    lines = [line.split() for line in screen.getvalue().splitlines() if "learning_rate" in line]
    shown_last = [line for line in lines if line[1] in ("runs", "done", "ended")][-4:]
    assert [line[0] for line in shown_last] == ["3", "2", "0", "1"], "what runs, then the best, then what ended early"
    assert shown_last[0][1:3] == ["runs", "12/90"]
    assert shown_last[1][1:4] == ["done", "0.9000", "90/90"]
    assert shown_last[1][-2:] == ["learning_rate", "0.0003"], "only what differs between them"


def test_the_report_for_people(screen: io.StringIO) -> None:
    def one(number: int, value: float, **more: Any) -> dict[str, Any]:
        usual = {
            "state": "done",
            "reason": "",
            "spread": None,
            "seconds": 2.0,
            "memory_bytes": 1 << 20,
            "latency_ms": None,
        }
        return {"number": number, "value": value, "steps": 9.0, "settings": {"learning_rate": 1e-4}, **usual, **more}

    found = {
        "metric": "perplexity", "higher_is_better": False, "objectives": ["quality"], "front": [], "seconds": 65.0,
        "trials": [one(0, 12.5), one(1, 9.5, spread=0.25), one(2, 3.0, state="failed", reason="[odd] loss")],
        "best": one(1, 9.5), "steps": 27, "importance": {"learning_rate": 0.75},
        "counts": {"done": 2, "pruned": 0, "failed": 1, "stopped": 0},
    }  # fmt: skip
    trials.show_search(found)
    text = screen.getvalue()
    assert text.index("9.5000 ± 0.2500") < text.index("12.5000"), "the lowest perplexity first"
    assert "what mattered: learning_rate 75%" in text
    assert "trial 2 failed: [odd] loss" in text
    assert "2 done, 1 failed; 27 steps in 65 s" in text
