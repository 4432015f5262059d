"""Live progress fits a narrow terminal, and says what starts, what waits and what becomes of the work."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console

from llmo.doors.cli import live
from llmo.doors.flow import News
from llmo.types import Event, Job, JobState, Needs, Reason


def job(id: int, op: str = "train", state: JobState = JobState.RUNNING, **more: Any) -> Job:
    return Job(id, op, {}, {}, Needs(), state, **more)


class Nothing:
    """As much of an API as progress asks: somebody else runs the jobs, or nobody."""

    def __init__(self, url: str | None) -> None:
        self.url = url

    def held_elsewhere(self) -> Any:
        return self if self.url else None


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    out = io.StringIO()
    monkeypatch.setattr(live, "console", Console(file=out, force_terminal=True, width=80, height=20, color_system=None))
    return out


def progress(job: int, **data: Any) -> Event:
    return Event(1, job, 1, time.time(), "progress", data)


def test_a_narrow_terminal_shows_count_and_time_whole(screen: io.StringIO) -> None:
    shown = live.Live(Nothing(None))  # type: ignore[arg-type]
    running = job(2, child_key="train")
    with shown:
        for step in (310, 12_345):
            event = progress(2, step=step, total=72_000, loss=0.123456, learning_rate=1e-4, samples_per_second=1234.5)
            shown.hear(News(job(1, "pipeline"), {2: running}, [event]))
        shown.hear(News(job(1, "pipeline"), {2: running}, [progress(2, step=5, total=48, phase="dev")]))
        shown._progress.refresh()
    text = screen.getvalue()
    assert "12345/72000" in text
    assert "loss 0.1235" in text
    assert "train: dev" in text
    assert "5/48" in text


def test_what_starts_is_seen_before_it_reports(screen: io.StringIO) -> None:
    with live.Live(Nothing(None)) as shown:  # type: ignore[arg-type]
        shown.hear(News(job(1, "pipeline"), {2: job(2, state=JobState.STARTING, child_key="train")}, []))
        shown._progress.refresh()
    assert "train" in screen.getvalue()


def test_brackets_in_notes_and_reasons_are_shown_as_they_are(screen: io.StringIO) -> None:
    waits = job(2, state=JobState.QUEUED, child_key="train", waiting="needs [/b] cores")
    with live.Live(Nothing(None)) as shown:  # type: ignore[arg-type]
        note = Event(1, 2, 1, 0.0, "note", {"text": "labels [red] and [/x]"})
        shown.hear(News(job(1, "pipeline"), {2: waits}, [note]))
    assert "labels [red] and [/x]" in screen.getvalue()
    assert "waits: needs [/b] cores" in screen.getvalue()


def test_why_a_job_is_tried_again_is_told(screen: io.StringIO) -> None:
    told = [("queued", "process 2 of 2 ended"), ("queued", ""), ("running", "")]
    with live.Live(Nothing(None)) as shown:  # type: ignore[arg-type]
        events = [Event(1, 2, 1, 0.0, "state", {"state": state, "reason": None, "text": text}) for state, text in told]
        shown.hear(News(job(1, "pipeline"), {2: job(2, child_key="train")}, events))
    assert screen.getvalue().count("is tried again") == 1
    assert "train is tried again: process 2 of 2 ended" in screen.getvalue()


def test_a_whole_run_that_waits_says_so(screen: io.StringIO) -> None:
    root = job(1, "pipeline", JobState.QUEUED, name="news", waiting="another command works in this store")
    with live.Live(Nothing(None)) as shown:  # type: ignore[arg-type]
        shown.hear(News(root, {}, []))
        shown.hear(News(root, {}, []))
    assert screen.getvalue().count("news waits: another command") == 1


def test_dev_is_told_in_a_line_but_not_too_often(screen: io.StringIO) -> None:
    with live.Live(Nothing(None)) as shown:  # type: ignore[arg-type]
        for step in range(1, 50):
            event = progress(2, step=step, total=50, train_loss=1.0, dev_accuracy=0.91, dev_macro_f1=0.9, dev_f1=0.1)
            shown.hear(News(job(2), {}, [event]))
    lines = [line for line in screen.getvalue().splitlines() if "step 1 of 50: loss 1, dev accuracy 0.910" in line]
    assert len(lines) == 1
    assert "dev f1" not in lines[0]


@pytest.mark.parametrize(("url", "words"), [("http://x", "job 7 goes on"), (None, "same command goes on")])
def test_ctrl_c_says_what_becomes_of_the_work(
    screen: io.StringIO, capsys: pytest.CaptureFixture[str], url: str | None, words: str
) -> None:
    with pytest.raises(KeyboardInterrupt), live.Live(Nothing(url), quiet=True) as shown:  # type: ignore[arg-type]
        shown.hear(News(job(7), {}, []))
        raise KeyboardInterrupt
    assert words in capsys.readouterr().err


def test_how_a_step_ended(screen: io.StringIO) -> None:
    with live.Live(Nothing(None)) as shown:  # type: ignore[arg-type]
        ended = {"started_at": 1.0, "ended_at": 3.5}
        children = [
            job(2, state=JobState.DONE, child_key="data", reason=Reason.CACHED),
            job(3, state=JobState.FAILED, child_key="train", reason=Reason.OUT_OF_MEMORY, **ended),
            job(4, state=JobState.FAILED, child_key="base", reason=Reason.ERROR, **ended),
        ]
        shown.hear(News(job(1, "pipeline"), {child.id: child for child in children}, []))
    text = screen.getvalue()
    assert "found, nothing changed" in text
    assert "failed: out of memory 2.5 s" in text
    assert "failed 2.5 s" in text
