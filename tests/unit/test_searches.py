"""What a search is told of the machine and of the past: how wide, and which earlier searches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmo import pipeline, searches
from llmo.jobspecs import TuneJobSpec
from llmo.specs import ProjectSpec, TaskSpec
from llmo.store import Store
from llmo.types import Device, JobState, Kind, Needs

GIB = 1 << 30


def machine(cores: int, gib: int = 64) -> list[Device]:
    return [Device("cpu", "cpu", memory=gib * GIB, free=gib * GIB, cores=cores)]


def spec(**keys: Any) -> dict[str, Any]:
    return TuneJobSpec(task=TaskSpec(name="text-classification"), **keys).plain()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "home") as made:
        yield made


def report(store: Store, tmp_path: Path, number: int, *, task: str = "text-classification", model: str = "base") -> str:
    folder = tmp_path / f"report-{number}"
    folder.mkdir()
    (folder / "report.json").write_text(str(number))
    card = {"kind": "search", "task": task}
    inputs = {"data": f"data-{number}", "model": model}
    return store.catalog.publish(Kind.REPORT, "search", folder, card, job=None, inputs=inputs).digest


@pytest.mark.parametrize(
    ("cores", "gib", "keys", "width", "each"),
    [
        (1, 64, {}, 1, 1),
        (2, 64, {}, 2, 1),
        (16, 64, {}, 5, 3),
        (16, 7, {}, 2, 8),
        (16, 2, {}, 1, 16),
        (8, 64, {"trials": 8}, 2, 4),
        (8, 64, {"trials": 100}, 8, 1),
        (8, 64, {"parallel": 4}, 4, 2),
        (2, 64, {"parallel": 4}, 2, 1),
        (8, 64, {"objectives": ["quality", "latency"]}, 1, 8),
        (8, 64, {"objectives": ["quality", "memory"]}, 5, 1),
    ],
)
def test_a_search_is_as_wide_as_the_machine(
    store: Store, cores: int, gib: int, keys: dict[str, Any], width: int, each: int
) -> None:
    found, _ = searches.complete(store, machine(cores, gib), spec(**keys), {})
    assert (found["width"], found["cores"]) == (width, each)


def test_it_begins_with_the_newest_searches_for_the_same_task_on_the_same_base(store: Store, tmp_path: Path) -> None:
    mine = [report(store, tmp_path, number) for number in range(4)]
    report(store, tmp_path, 4, task="token-classification")
    report(store, tmp_path, 5, model="another")
    inputs = {"data": "new", "model": "base"}
    _, found = searches.complete(store, machine(2), spec(), inputs)
    assert found == {**inputs, "earlier-1": mine[3], "earlier-2": mine[2], "earlier-3": mine[1]}
    assert searches.complete(store, machine(2), spec(warm_start=False), inputs)[1] == inputs


def test_the_same_search_keeps_what_it_began_with(store: Store, tmp_path: Path) -> None:
    first = report(store, tmp_path, 0)
    inputs = {"data": "new", "model": "base"}
    asked, given = searches.complete(store, machine(2), spec(), inputs)
    store.jobs.insert(op="tune", spec=asked, inputs=given, needs=Needs(), state=JobState.DONE)
    report(store, tmp_path, 1)
    assert searches.complete(store, machine(2), spec(), inputs) == (asked, {**inputs, "earlier-1": first})
    assert len(searches.complete(store, machine(2), spec(seed=2), inputs)[1]) == 4, "another search learns from both"


def test_a_project_with_a_search_trains_with_what_it_finds(store: Store) -> None:
    project = {
        "name": "x",
        "task": "text-classification",
        "data": {"source": "a.csv"},
        "model": "base@1",
        "train": {"method": "lora"},
        "tune": {"trials": 3, "space": {"lora.rank": [2, 4]}},
    }
    plain = ProjectSpec.model_validate(project).plain()
    sources = {"data": {"source": "a.csv", "digest": "d"}, "model": {"artifact": "base"}}
    steps = searches.settle(store, machine(2), pipeline.plan(plain, sources))
    assert [step.key for step in steps] == ["data", "tune", "train", "verify"]
    tune, train = steps[1:3]
    assert (tune.spec["width"], tune.spec["train"]["method"]) == (1, "lora")
    TuneJobSpec(**tune.spec)
    assert train.settled({}) is None, "it waits for the search"
    settled = train.settled({"tune": {"settings": {"lora": {"rank": 4}, "task": {"max_length": 64}}}})
    assert settled is not None
    assert (settled["lora"]["rank"], settled["lora"]["alpha"], settled["task"]["max_length"]) == (4, 16, 64)
    assert settled["task"]["name"] == "text-classification"
