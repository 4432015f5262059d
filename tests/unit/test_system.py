"""What a System stops when it closes: what it asked for itself, never what others asked for too."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmo.doors import sdk
from llmo.errors import InputError, ModelError, SpecError
from llmo.settings import Settings
from llmo.system import System
from llmo.types import JobState, Kind, Needs, Placement

ROWS = "text,label\n" + "".join(f"word number {i},{'ab'[i % 2]}\n" for i in range(30))


def ask(system: System, source: Path, name: str = "x") -> int:
    return system.submit("import", {"source": str(source), "task": "text-classification"}, name=name).id


def test_a_command_beside_another_stops_its_own_jobs_only(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(ROWS)
    settings = Settings(home=tmp_path / "home")
    with System(settings) as first:
        first.start()  # it runs this store's jobs, but only those it is asked for
        second = System(settings)
        job = ask(second, tmp_path / "x.csv")
        third = System(settings)
        assert ask(third, tmp_path / "x.csv") == job, "the same work is one job"
        third.close()
        assert first.job(job).state is JobState.QUEUED
        second.close()
        assert first.job(job).state is JobState.STOPPED


def test_what_waits_begins_when_the_other_command_ends(tmp_path: Path) -> None:
    from llmo.doors import flow

    (tmp_path / "x.csv").write_text(ROWS)
    settings = Settings(home=tmp_path / "home")
    first = System(settings)
    first.start()
    with System(settings) as second:
        job = second.job(ask(second, tmp_path / "x.csv", "two"))
        first.close()
        assert flow.output(second, flow.wait(second, job)).ref == "two@1"


@pytest.mark.parametrize(
    ("op", "spec", "inputs", "words"),
    [
        ("cook", {}, {}, "cannot be submitted"),
        ("train", {"task": "text-classification"}, {}, "needs the input 'data'"),
        ("serve", {"endpoint": "x"}, {}, "needs the input 'model'"),
        ("import", {"source": "x", "task": "text-classification"}, {"data": "x"}, "no input 'data'"),
        ("import", {"source": "x", "task": "cooking"}, {}, "unknown task"),
        ("import", {"source": "\ud800", "task": "text-classification"}, {}, "surrogate"),
    ],
)
def test_jobs_that_are_not_taken(tmp_path: Path, op: str, spec: dict, inputs: dict, words: str) -> None:
    with System(Settings(home=tmp_path / "home")) as system:
        with pytest.raises(SpecError, match=words):
            system.submit(op, spec, inputs)
        assert system.jobs(all=True) == []


def test_what_gives_no_answers_is_not_deployed(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").write_text("x")
    with System(Settings(home=tmp_path / "home")) as system:
        system.save(tmp_path / "made", "base", {"model_type": "bert"})
        with pytest.raises(ModelError, match="base model"):
            system.submit("serve", {"endpoint": "x"}, {"model": "base"})
        (tmp_path / "more").mkdir()
        (tmp_path / "more" / "file").write_text("y")
        system.save(tmp_path / "more", "news", {}, Kind.DATASET)
        with pytest.raises(InputError, match="no model 'news'"):
            system.submit("serve", {"endpoint": "x"}, {"model": "news"})


def test_a_job_left_by_a_killed_process_is_shown_as_waiting(tmp_path: Path) -> None:
    with System(Settings(home=tmp_path / "home")) as system:
        job = system.store.jobs.insert(op="import", spec={}, inputs={}, needs=Needs())
        assert system.store.jobs.claim(job.id, 1, "a lease of who was killed", Placement(1, 1))
        (shown,) = system.jobs()
        assert shown.state is JobState.QUEUED
        assert "llmo up" in shown.waiting


def test_what_is_asked_for_must_be_there(tmp_path: Path) -> None:
    with System(Settings(home=tmp_path / "home")) as system:
        with pytest.raises(InputError, match="no text"):
            system.predict("x", [])
        (tmp_path / "x.csv").write_text(ROWS)
        data = sdk.Dataset.load(tmp_path / "x.csv", name="x", api=system)
        with pytest.raises(InputError, match="cannot be shown"):
            data.rows(offset=-5)
        with pytest.raises(SpecError, match="named by text"):
            sdk.train(data, model=5)  # type: ignore[arg-type]
