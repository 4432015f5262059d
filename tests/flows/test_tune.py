"""`llmo tune` from a file to a model: killed in the middle it repeats nothing, and what is wrong is said at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmo.doors.cli.commands import run
from llmo.store import Store
from llmo.types import Job, JobState, Kind
from support.crashes import members, until
from support.project import llmo, project

TUNE = """\
tune:
  trials: 4
  space:
    learning_rate: {low: 1e-4, high: 1e-2, log: true}
    batch_size: [8, 16]
"""


def trials(store: Store) -> list[Job]:
    return store.jobs.list(op="trial", limit=None, newest_first=False)


def test_a_search_killed_in_the_middle_repeats_nothing_that_was_finished(tmp_path: Path) -> None:
    file, home = project(tmp_path / "project", rows=120, extra=TUNE), tmp_path / "home"
    file.write_text(file.read_text().replace("epochs: 10, learning_rate: 5e-3, batch_size: 8", "epochs: 4"))
    env = {"LLMO_HOME": str(home), "LLMO_CORES": "1"}
    store = Store.open(home)
    command = [sys.executable, "-m", "llmo.doors.cli", "tune", str(file), "--json"]
    with (tmp_path / "killed.out").open("wb") as out:
        killed = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **env}, start_new_session=True)

    def under_way() -> bool:
        assert killed.poll() is None, (tmp_path / "killed.out").read_text()
        states = [job.state for job in trials(store)]
        return states.count(JobState.DONE) == 2 and JobState.RUNNING in states

    until(under_way, "the third trial", pause=0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(20)
    for pid in members(home):
        os.kill(pid, signal.SIGKILL)
    until(lambda: not members(home), "all of it to be dead", 20)
    before = {job.child_key: job for job in trials(store)}

    said = llmo("tune", file, "--json", **env)
    assert said.code == 0, said.err
    found = said.json
    after = {str(job.child_key): job for job in trials(store)}
    assert sorted(after) == ["trial-0", "trial-1", "trial-2", "trial-3"]
    assert {key: job.id for key, job in before.items()}.items() <= {key: job.id for key, job in after.items()}.items()
    for key, job in before.items():
        if job.state is JobState.DONE:
            assert after[str(key)] == job, "what was finished was done again"
    assert [after[key].attempt for key in sorted(after)] == [1, 1, 2, 1]
    check_outcome(store, found, after)
    store.close()

    shown = llmo("report", "tickets-search", **env)
    assert (shown.code, "the best trials" in shown.out) == (0, True), shown.err
    again = llmo("tune", file, "--json", **env)
    assert again.json == found
    with Store.open(home) as looked:
        assert trials(looked) == list(after.values()), "found, not repeated"


def check_outcome(store: Store, found: dict[str, Any], jobs: dict[str, Job]) -> None:
    assert (found["ref"], found["report"]) == ("tickets@1", "tickets-search@1")
    assert found["trials"][0]["settings"] == {"batch_size": 16, "learning_rate": 1e-4}, "the usual settings come first"
    assert [trial["jobs"] for trial in found["trials"]] == [[jobs[key].id] for key in sorted(jobs)]
    done = {trial["number"]: trial["value"] for trial in found["trials"] if trial["state"] == "done"}
    assert found["best"]["value"] == max(done.values())
    model, report = store.catalog.get("tickets@1", Kind.MODEL), store.catalog.get("tickets-search@1", Kind.REPORT)
    for key, value in found["settings"].items():
        assert model.card["train"][key] == value, "the model is trained with the best settings"
    assert model.card["metrics"]["dev"]["accuracy"]["value"] == found["best"]["value"], (
        "and comes to what the trial did"
    )
    folder = store.catalog.path(report.digest)
    assert {"report.json", "report.html", "history.png"} <= {path.name for path in folder.iterdir()}
    assert store.jobs.list(op="trial", limit=None)[0].output is None, "trials keep no weights"


@pytest.mark.parametrize(
    ("section", "flags", "words"),
    [
        (
            "tune: {space: {learning_rate: {low: 1, high: 1}}}",
            [],
            "llmo.yaml:6: 'tune.space.learning_rate': the range is",
        ),
        ("tune: {budget: 0}", [], "llmo.yaml:6: 'tune.budget': input should be greater than 0"),
        ("", ["--budget", "0m"], "flags of `llmo tune`: 'tune.budget': input should be greater than 0"),
        ("", ["--trials", "0"], "'tune.trials': input should be greater than or equal to 1"),
        ("", ["--objective", "quality,speed"], "'tune.objectives.1': input should be"),
        ("", ["--sampler", "best"], "'tune.sampler': input should be"),
        ("", ["--folds", "1"], "'tune.folds': input should be"),
        ("tune: {objectives: [quality, memory]}", ["--pruner", "asha"], "there are several objectives"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_done(
    section: str,
    flags: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LLMO_HOME", str(tmp_path / "home"))
    file = tmp_path / "llmo.yaml"
    file.write_text(
        "name: x\ntask: text-classification\ndata:\n  source: none.csv\nmodel: none\n" + (section and f"{section}\n")
    )
    assert run(["tune", str(file), *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "home").exists()
