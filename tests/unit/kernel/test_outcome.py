"""What becomes of a job, for every way in which an attempt can end."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from llmo.errors import DataError, JobFailed
from llmo.kernel.executor import DONE, FAILED, OUT_OF_MEMORY, STOPPED, Exit
from llmo.kernel.outcome import Ending, explain, judge
from llmo.types import Job, JobState, Needs

JOB = Job(7, "train", {}, {}, Needs(), JobState.RUNNING)
SERVICE = dataclasses.replace(JOB, op="serve", service=True)
REFUSED = DataError("bad").to_json()
CRASHED = JobFailed("crash").to_json()


@pytest.mark.parametrize(
    ("job", "end", "state", "reason"),
    [
        (JOB, Ending(Exit(DONE), complete=True), "done", "finished"),
        (JOB.evolve(stop_requested=True), Ending(Exit(DONE), complete=True), "done", "finished"),
        (JOB, Ending(Exit(DONE)), "queued", "lost"),
        (JOB.evolve(attempt=3), Ending(Exit(DONE)), "failed", "lost"),
        (JOB, Ending(Exit(-9), complete=True), "queued", "lost"),
        (JOB, Ending(Exit(FAILED), REFUSED), "failed", "error"),
        (JOB, Ending(Exit(FAILED), CRASHED), "failed", "error"),
        (JOB, Ending(Exit(FAILED)), "failed", "error"),
        (JOB, Ending(Exit(OUT_OF_MEMORY), CRASHED), "failed", "out_of_memory"),
        (JOB, Ending(Exit(-9, out_of_memory=True)), "queued", "out_of_memory"),
        (JOB.evolve(attempt=3), Ending(Exit(-9, out_of_memory=True)), "failed", "out_of_memory"),
        (JOB, Ending(Exit(-11)), "queued", "lost"),
        (JOB.evolve(attempt=3), Ending(Exit(-11)), "failed", "lost"),
        (JOB.evolve(attempt=3), Ending(Exit(-11), earned=True), "queued", "lost"),
        (JOB, Ending(Exit(STOPPED)), "queued", "lost"),
        (JOB.evolve(stop_requested=True), Ending(Exit(STOPPED)), "stopped", "user"),
        (JOB.evolve(stop_requested=True), Ending(Exit(-9, asked=True)), "stopped", "user"),
        (JOB.evolve(stop_requested=True), Ending(Exit(FAILED), REFUSED), "stopped", "user"),
        (JOB.evolve(attempt=3), Ending(Exit(STOPPED), interrupted=True), "queued", "preempted"),
        (JOB, Ending(Exit(FAILED), REFUSED, interrupted=True), "failed", "error"),
        (SERVICE, Ending(Exit(DONE), complete=True), "queued", "lost"),
        (SERVICE, Ending(Exit(FAILED), REFUSED), "failed", "error"),
        (SERVICE, Ending(Exit(FAILED), CRASHED), "queued", "lost"),
        (SERVICE.evolve(attempt=3), Ending(Exit(FAILED), CRASHED), "failed", "lost"),
        (SERVICE.evolve(stop_requested=True), Ending(Exit(DONE), complete=True), "stopped", "user"),
        (SERVICE.evolve(attempt=9, max_attempts=9), Ending(Exit(-9), earned=True), "queued", "lost"),
    ],
)
def test_outcomes(job: Job, end: Ending, state: str, reason: str) -> None:
    outcome = judge(job, end)
    assert (outcome.state.value, outcome.reason.value) == (state, reason)
    if outcome.state is JobState.FAILED:
        assert outcome.error is not None
        assert outcome.error["what"]
    if outcome.state is JobState.QUEUED:
        assert outcome.max_attempts > job.attempt


def test_an_interruption_costs_no_attempt() -> None:
    assert judge(JOB.evolve(attempt=3), Ending(Exit(-9, asked=True), interrupted=True)).max_attempts == 4
    assert judge(JOB, Ending(Exit(-9))).max_attempts == 3


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (Ending(Exit(-9)), "probably by the out-of-memory killer"),
        (Ending(Exit(-9, out_of_memory=True)), "ran out of memory"),
        (Ending(Exit(-9, asked=True), silent=True), "no sign of life"),
        (Ending(Exit(-9, asked=True)), "signal 9"),
        (Ending(Exit(-11)), "Segmentation fault"),
        (Ending(Exit(1)), "exit code 1"),
        (Ending(Exit(STOPPED)), "other than LLMO"),
    ],
)
def test_a_loss_is_a_sentence(end: Ending, words: str) -> None:
    found: Any = explain(JOB, end)
    assert words in found
